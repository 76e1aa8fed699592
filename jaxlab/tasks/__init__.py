"""Methods that split tasks."""
