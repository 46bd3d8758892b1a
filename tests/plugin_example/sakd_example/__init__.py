"""A plug-in of sakd: one distiller and one network."""
