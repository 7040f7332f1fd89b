//! Metrics of the streams service.

afterimage_core::metrics! {
    "Streams" {
        RUNNING = Gauge("stream_running", Count, "running", "Streams that are open");
        STARTED = Counter("stream_started", Count, "started", "Streams that began or were resumed");
        RESUMED = Counter("stream_resumed", Count, "resumed", "Streams that continued at a checkpoint");
        COMPLETED = Counter("stream_completed", Count, "completed", "Streams that ended with a result");
        FAILED = Counter("stream_failed", Count, "failed", "Streams that ended with an error");
        BYTES = Counter("stream_received_bytes", Bytes, "received", "Bytes received from clients");
    }
}
