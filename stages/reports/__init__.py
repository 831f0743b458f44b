"""What people read: pages, charts, galleries and model cards."""
