"""From a config to videos: settings of methods, the setup of a stream, files."""
