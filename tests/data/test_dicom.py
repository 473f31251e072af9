"""DICOM: stated grey from every way of storing it, refusals with reasons, and nothing of a patient anywhere."""

from __future__ import annotations

import base64
import logging
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import DEFLATED, bad_dicoms, dicom, grey, lut, saved
from pydicom.dataset import Dataset
from pydicom.uid import UID

from embedcache.data.radiograph import DecodePolicy, read_radiograph
from embedcache.errors import InputError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "dicom"


def read(tmp_path: Path, dataset: Dataset | bytes, **policy: Any) -> np.ndarray:
    path = tmp_path / "x.dcm"
    path.write_bytes(dataset if isinstance(dataset, bytes) else saved(dataset))
    return read_radiograph(path, DecodePolicy(**{"channels": "grey", **policy})).pixels


def to_bytes(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def test_without_a_window_the_image_is_stretched(tmp_path: Path) -> None:
    values = grey() + 300
    np.testing.assert_array_equal(read(tmp_path, dicom(values)), to_bytes(values, 300, 4395))
    rgb = read(tmp_path, dicom(values), channels="rgb")
    assert rgb.shape == (32, 40, 3)
    np.testing.assert_array_equal(rgb[..., 2], to_bytes(values, 300, 4395))


def test_a_constant_image_is_black(tmp_path: Path) -> None:
    assert not read(tmp_path, dicom(np.full((4, 4), 77, np.uint16))).any()


@pytest.mark.parametrize(
    ("function", "low", "high"),
    [("LINEAR", 2000 - 0.5 - 499.5, 2000 - 0.5 + 499.5), ("LINEAR_EXACT", 1500, 2500), (None, 1500, 2499)],
)
def test_windows(tmp_path: Path, function: str | None, low: float, high: float) -> None:
    tags = {"WindowCenter": 2000, "WindowWidth": 1000, **({"VOILUTFunction": function} if function else {})}
    np.testing.assert_array_equal(read(tmp_path, dicom(grey(), **tags)), to_bytes(grey(), low, high))


def test_the_window_agrees_with_pydicoms_own(tmp_path: Path) -> None:
    """pydicom maps to the range of the stored bits; the levels are the same."""
    from pydicom.pixels import apply_windowing

    dataset = dicom(grey(), WindowCenter=1000, WindowWidth=1500, BitsStored=12, HighBit=11)
    expected = apply_windowing(grey(), dataset) / 4095 * 255
    assert np.abs(read(tmp_path, dataset) - expected).max() <= 0.5 + 1e-9
    sigmoid = dicom(grey(), WindowCenter=1000, WindowWidth=1500, VOILUTFunction="SIGMOID", BitsStored=12, HighBit=11)
    expected = apply_windowing(grey(), sigmoid) / 4095 * 255
    assert np.abs(read(tmp_path, sigmoid).astype(float) - expected).max() <= 1


def test_several_windows_and_one_of_ones_own(tmp_path: Path) -> None:
    dataset = dicom(grey(), WindowCenter=[2000, 1000], WindowWidth=[1000, 400])
    second = read(tmp_path, dataset, window_index=1)
    np.testing.assert_array_equal(second, to_bytes(grey(), 1000 - 0.5 - 199.5, 1000 - 0.5 + 199.5))
    own = read(tmp_path, dataset, window=(3000.0, 201.0))
    np.testing.assert_array_equal(own, to_bytes(grey(), 3000 - 0.5 - 100, 3000 - 0.5 + 100))
    with pytest.raises(InputError, match="2 windows, window 5 was asked for"):
        read(tmp_path, dataset, window_index=5)


def test_rescale_signed_and_twelve_bits(tmp_path: Path) -> None:
    values = (grey().astype(np.int32) - 2000).astype(np.int16)
    dataset = dicom(values, RescaleSlope="2", RescaleIntercept="-10", WindowCenter=0, WindowWidth=2001)
    np.testing.assert_array_equal(read(tmp_path, dataset), to_bytes(values * 2.0 - 10, -1000.5, 999.5))
    twelve = dicom(grey(), BitsStored=12, HighBit=11)
    np.testing.assert_array_equal(read(tmp_path, twelve, intensity="stored-bits"), to_bytes(grey(), 0, 4095))
    np.testing.assert_array_equal(
        read(tmp_path, dicom(values), intensity="stored-bits"), to_bytes(values, -32768, 32767)
    )


def test_the_papers_rule(tmp_path: Path) -> None:
    """255 over the largest stored value, whatever window the file has, then MONOCHROME1 inverted."""
    values = grey(top=3000) + 200
    tags = {"WindowCenter": 100, "WindowWidth": 10, "PhotometricInterpretation": "MONOCHROME1"}
    expected = 255 - to_bytes(values, 0, values.max())
    got = read(tmp_path, dicom(values, **tags), intensity="max").astype(int)
    assert np.abs(got - expected).max() <= 1  # ties
    assert (got != expected).mean() < 0.01


def test_lookup_tables(tmp_path: Path) -> None:
    values = (np.arange(64) % 16).astype(np.uint8).reshape(8, 8)
    rising = [k * k for k in range(16)]
    voi = dicom(values, VOILUTSequence=[lut(rising, 0, 8)], WindowCenter=3, WindowWidth=2)
    np.testing.assert_array_equal(read(tmp_path, voi), np.array(rising, np.uint8)[values])
    modality = dicom(values, ModalityLUTSequence=[lut([1000 + 10 * k for k in range(16)], 0, 16)])
    np.testing.assert_array_equal(read(tmp_path, modality), to_bytes(1000 + 10 * values.astype(int), 1000, 1150))


def test_monochrome1_is_inverted_unless_kept(tmp_path: Path) -> None:
    dataset = dicom(grey(), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read(tmp_path, dataset), 255 - to_bytes(grey(), 0, 4095))
    np.testing.assert_array_equal(read(tmp_path, dataset, monochrome1="keep"), to_bytes(grey(), 0, 4095))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_becomes_black_and_stretches_nothing(tmp_path: Path, photometric: str) -> None:
    values = grey() + 500
    values[:, :5] = 65000
    values[:, 35:] = 64000
    tags = {"PixelPaddingValue": 65000, "PixelPaddingRangeLimit": 64000, "PhotometricInterpretation": photometric}
    shown = read(tmp_path, dicom(values, **tags))
    assert not shown[:, :5].any()
    assert not shown[:, 35:].any()
    inner = values[:, 5:35]
    expected = to_bytes(inner, inner.min(), inner.max())
    np.testing.assert_array_equal(shown[:, 5:35], 255 - expected if photometric == "MONOCHROME1" else expected)
    kept = read(tmp_path, dicom(values, **tags), padding="keep")
    assert set(np.unique(kept[:, :5])) == {0 if photometric == "MONOCHROME1" else 255}


def test_frames_are_chosen(tmp_path: Path) -> None:
    frames = np.stack([grey(), grey()[::-1], grey()[:, ::-1]])
    np.testing.assert_array_equal(read(tmp_path, dicom(frames), frame=1), to_bytes(grey()[::-1], 0, 4095))
    with pytest.raises(InputError, match="3 frames, expected a single image; choose one"):
        read(tmp_path, dicom(frames))
    with pytest.raises(InputError, match="3 frames, frame 7 was asked for"):
        read(tmp_path, dicom(frames), frame=7)
    np.testing.assert_array_equal(read(tmp_path, dicom(grey()), frame=0), to_bytes(grey(), 0, 4095))


def test_colour(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(read(tmp_path, dicom(values), channels="rgb"), values)
    luma = values @ np.array([0.299, 0.587, 0.114])
    assert np.abs(read(tmp_path, dicom(values)) - luma).max() <= 1


@pytest.mark.parametrize(
    ("syntax", "bits"),
    [
        ("1.2.840.10008.1.2", 16),
        ("1.2.840.10008.1.2.1", 16),
        (str(DEFLATED), 16),
        ("1.2.840.10008.1.2.5", 16),
        ("1.2.840.10008.1.2.4.80", 12),
        ("1.2.840.10008.1.2.4.90", 16),
        ("1.2.840.10008.1.2.4.90", 12),
    ],
)
def test_lossless_transfer_syntaxes_give_the_same_pixels(tmp_path: Path, syntax: str, bits: int) -> None:
    top = 2**bits - 1
    plain = dicom(grey(top=top), BitsStored=bits, HighBit=bits - 1, WindowCenter=top // 2, WindowWidth=top)
    if syntax.startswith(("1.2.840.10008.1.2.4", "1.2.840.10008.1.2.5")):
        compressed = dicom(grey(top=top), BitsStored=bits, HighBit=bits - 1, WindowCenter=top // 2, WindowWidth=top)
        compressed.compress(UID(syntax), generate_instance_uid=False)
    else:
        compressed = dicom(
            grey(top=top), syntax=syntax, BitsStored=bits, HighBit=bits - 1, WindowCenter=top // 2, WindowWidth=top
        )
    np.testing.assert_array_equal(read(tmp_path, compressed), read(tmp_path, plain))


@pytest.mark.parametrize("name", bad_dicoms())
def test_bad_files_have_their_reason(tmp_path: Path, name: str) -> None:
    content, reason = bad_dicoms()[name]
    limit = {"max_file_bytes": 2**20} if "bomb" in name else {}
    with pytest.raises(InputError) as caught:
        read(tmp_path, content, **limit)
    assert caught.value.reason in reason.split("|"), f"{caught.value.reason}: {caught.value}"


def test_an_unknown_transfer_syntax_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"transfer syntax 1\.2\.840\.10008\.1\.9\.9"):
        read(tmp_path, bad_dicoms()["unknown-syntax.dcm"][0])


def test_dicom_can_be_left_out_of_the_formats(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a DICOM file, expected PNG or JPEG"):
        read(tmp_path, dicom(grey()), formats=("PNG", "JPEG"))


CANARY = "CANARYzQ9"


def with_canaries(values: np.ndarray, **tags: Any) -> Dataset:
    """A file whose every tag about the patient holds the canary, some of them against the rules of their type."""
    names = (
        "PatientName PatientID PatientAddress PatientComments OtherPatientNames PatientMotherBirthName MilitaryRank",
        "EthnicGroup Occupation AdditionalPatientHistory InstitutionName InstitutionAddress ReferringPhysicianName",
        "PerformingPhysicianName OperatorsName StationName StudyDescription SeriesDescription ProtocolName StudyID",
        "AccessionNumber ImageComments RequestingPhysician RequestedProcedureDescription DeviceSerialNumber",
        "AdmissionID IssuerOfPatientID MedicalAlerts Allergies",
    )
    dataset = dicom(values, **tags)
    for name in " ".join(names).split():
        setattr(dataset, name, CANARY)
    block = dataset.private_block(0x0011, CANARY, create=True)
    block.add_new(0x01, "LO", CANARY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in (("PatientAge", CANARY), ("StudyDate", CANARY), ("StudyInstanceUID", CANARY),
                               ("PatientWeight", CANARY), ("SpecificCharacterSet", CANARY)):  # fmt: skip
            from pydicom.datadict import dictionary_VR, tag_for_keyword
            from pydicom.dataelem import DataElement

            vr = "LO" if keyword == "PatientWeight" else dictionary_VR(keyword)
            dataset[keyword] = DataElement(tag_for_keyword(keyword), vr, value, validation_mode=0)
    return dataset


def holds_canary(text: str | bytes) -> bool:
    raw = text.encode() if isinstance(text, str) else text
    forms = (CANARY.encode(), CANARY.encode("utf-16-le"), CANARY.encode("utf-16-be"), base64.b64encode(CANARY.encode()))
    return any(form.lower() in raw.lower() for form in forms)


@pytest.mark.parametrize("spoil", ["nothing", "half", "rows", "window", "photometric", "bits", "frames", "meta"])
def test_nothing_of_a_patient_is_logged_shown_or_raised(tmp_path: Path, caplog, recwarn, capfd, spoil: str) -> None:
    tags: dict[str, Any] = {
        "rows": {"Rows": 999},
        "photometric": {"PhotometricInterpretation": CANARY},
        "bits": {"BitsAllocated": 7},
        "frames": {"NumberOfFrames": 4},
    }.get(spoil, {})
    dataset = with_canaries(grey(), **tags)
    content = saved(dataset)
    assert content.count(CANARY.encode()) > 30
    if spoil == "half":
        content = content[: len(content) * 6 // 10]
    if spoil == "window":
        from pydicom.dataelem import DataElement

        dataset["WindowCenter"] = DataElement(0x00281050, "LO", CANARY)
        dataset["WindowWidth"] = DataElement(0x00281051, "LO", CANARY)
        content = saved(dataset)
    if spoil == "meta":
        content = content.replace(b"1.2.840.10008.1.2.1\0", CANARY.encode() + b"\0" * 11)
    caplog.set_level(logging.DEBUG)
    shown = ""
    try:
        pixels = read(tmp_path, content)
        assert spoil == "nothing"
        assert pixels.shape == (32, 40)
    except InputError as error:
        shown = "".join(traceback.format_exception(error)) + repr(error) + error.reason
    captured = capfd.readouterr()
    seen = [shown, caplog.text, captured.out, captured.err, *(str(w.message) for w in recwarn.list)]
    assert not any(holds_canary(text) for text in seen), seen


def test_many_threads_read_the_same(tmp_path: Path) -> None:
    contents = [saved(with_canaries(grey(top=1000 + 300 * k), WindowCenter=500, WindowWidth=900)) for k in range(4)]
    for k, content in enumerate(contents):
        (tmp_path / f"{k}.dcm").write_bytes(content)
    expected = [read_radiograph(tmp_path / f"{k}.dcm", DecodePolicy()).pixels for k in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for k in np.random.default_rng(seed).integers(0, 4, 60):
            got = read_radiograph(tmp_path / f"{k}.dcm", DecodePolicy()).pixels
            if not np.array_equal(got, expected[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


OUTCOMES = {
    "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm": (1024, 1024),
    "Fake_MONOHR1.dcm": (1024, 1024),
    "HTJ2K_08_RGB.dcm": (480, 640),
    "JPGLosslessP14SV1_1s_1f_8b.dcm": (768, 1024),
    "OBXXXX1A_2frame.dcm": "several-frames",
    "RG1_J2KI.dcm": (1955, 1841),
    "RG3_J2KR.dcm": (1760, 1760),
    "examples_palette.dcm": (350, 800),
    "himl_cxr_1.dcm": (256, 256),
    "mlut_18.dcm": (512, 512),
    "vlut_04.dcm": (512, 512),
    "waveform_ecg.dcm": "no-pixels",
}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real DICOM files are not beside this checkout")
@pytest.mark.parametrize("name", OUTCOMES)
def test_real_files(name: str) -> None:
    expected = OUTCOMES[name]
    if isinstance(expected, str):
        with pytest.raises(InputError) as caught:
            read_radiograph(REAL / name, DecodePolicy())
        assert caught.value.reason == expected
        return
    pixels = read_radiograph(REAL / name, DecodePolicy()).pixels
    assert pixels.shape == (*expected, 3)
    if name.startswith("RG1"):  # MONOCHROME1: lungs are dark and the border outside the patient is not white
        assert pixels[:, :20].mean() < 255
