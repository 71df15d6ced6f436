"""What users see of their data: counts, reasons, token lengths, thumbnails."""
