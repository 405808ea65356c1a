"""What runs came to: tables, figures and the page they stand on."""
