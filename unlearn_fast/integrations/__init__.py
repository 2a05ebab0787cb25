"""The methods on other libraries' models and files. Optional packages are imported where they are used."""
