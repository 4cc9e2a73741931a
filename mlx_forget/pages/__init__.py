"""Self-contained HTML pages: no script, no request, every text escaped by the template engine; the skeleton and plots that they share."""
