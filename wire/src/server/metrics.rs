//! Metrics of every service: its identity, its connections and its requests.

afterimage_core::metrics! {
    "" {
        SERVICE = Text("service", Count, "service", "Kind of the service");
        VERSION = Text("version", Count, "version", "Program and version of the server");
        UPTIME = Counter("uptime_ms", Millis, "up", "Time since the service started");
    }
    "Connections" {
        OPEN = Gauge("connections_open", Count, "open", "Open connections");
        ACCEPTED = Counter("connections_accepted", Count, "accepted", "Connections accepted");
        REFUSED = Counter("connections_refused", Count, "refused: too many", "Connections refused because too many were open");
        EVICTED = Counter("connections_evicted", Count, "evicted before their handshake", "Connections closed before their handshake to make room");
        UNAUTHENTICATED = Counter("connections_unauthenticated", Count, "wrong or missing token", "Connections with a wrong or missing token");
        TLS_HANDSHAKES = Counter("tls_handshakes", Count, "TLS handshakes", "TLS handshakes completed");
        TLS_RESUMED = Counter("tls_resumed", Count, "TLS sessions resumed", "TLS handshakes that resumed a session");
        TLS_FAILED = Counter("tls_failed", Count, "TLS handshakes failed", "TLS handshakes failed");
        REQUESTS = Counter("requests", Count, "requests", "Requests received");
        STREAMS = Counter("streams", Count, "streams", "Streams opened");
        MALFORMED = Counter("malformed", Count, "malformed requests", "Malformed requests received");
        PANICS = Counter("panics", Count, "panics", "Batches of requests whose handling panicked");
    }
}
