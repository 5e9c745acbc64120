"""One self-contained HTML file about a campaign, for readers who want to understand a search and for referees who distrust it."""
