"""Methods that split graphs and trees."""
