"""Stage one: every sample through a frozen encoder once, into a store."""
