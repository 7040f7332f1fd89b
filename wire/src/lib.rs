//! The Afterimage protocol: messages, codec, and both ends of a connection.
