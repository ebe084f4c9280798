"""Features on disk: embedded once, scored many times."""
