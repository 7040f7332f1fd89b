//! Images, features, ten one-vs-rest SVMs, their training and files, and the classifier service.
