"""What users see of their data: file counts, reasons for files left out, caption lengths, thumbnails."""
