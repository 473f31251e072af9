"""HTML pages of one file each: their templates, and how they are filled and written."""
