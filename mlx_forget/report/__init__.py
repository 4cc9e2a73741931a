"""What a sweep found, as one self-contained HTML page."""
