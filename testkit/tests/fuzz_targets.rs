//! Every fuzz target on its seeds, its regressions and seeded mutations of both, on any toolchain.

use afterimage_testkit::fuzz::exercise_named;

macro_rules! targets {
    ($($name:ident: $mutations:literal,)*) => {$(
        #[test]
        fn $name() {
            exercise_named(stringify!($name), $mutations);
        }
    )*

        #[test]
        fn every_target_is_exercised() {
            let exercised = [$(stringify!($name)),*];
            for target in afterimage_testkit::fuzz::targets() {
                assert!(exercised.contains(&target.name), "{} is not", target.name);
            }
        }
    };
}

targets! {
    decode_raw: 5000,
    round_trip: 3000,
    split_invariance: 2000,
    server_stream: 1500,
    server_streams: 1500,
    client_stream: 1000,
    table_model: 1000,
    snapshot_load: 1500,
    bytes_load: 1500,
    image_file: 6000,
    idx: 8000,
    model_file: 5000,
    shipped_model: 10,
    model_text: 4000,
    model_onnx: 4000,
    oip_http: 4000,
    oip_grpc: 4000,
    grpc_framing: 2000,
    oip_encodings: 1500,
    embeddings: 4000,
    stream_split: 3000,
    stream_run: 3000,
    settings: 150,
}
