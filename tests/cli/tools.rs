//! The other commands: `classify`, `train`, `eval`, `demo`, `bench`, `stats`.

use std::fmt::Write as _;

use afterimage_bench::workload::Population;
use afterimage_classifier::Model;
use afterimage_classifier_tools::Image;
use tempfile::TempDir;

use crate::common::{Running, answered, file, folder, run, run_with, text};
use crate::{gzip, idx, pgm_binary, welcome};

/// A data set of drawn digits, as the four files that MNIST comes in; two of them gzipped.
fn data_set(train: usize, test: usize) -> TempDir {
    let folder = folder();
    let (train, test) = (Population::drawn(31, train), Population::drawn(32, test));
    let labels = |digits: &Population| -> Vec<u8> {
        digits.labels().unwrap().iter().map(|&label| label as u8).collect()
    };
    let images = |digits: &Population| idx(&[digits.len(), 28, 28], digits.bytes());
    let labels = |digits: &Population| idx(&[digits.len()], &labels(digits));
    file(&folder, "train-images-idx3-ubyte", images(&train));
    file(&folder, "train-labels-idx1-ubyte.gz", gzip(&labels(&train)));
    file(&folder, "t10k-images-idx3-ubyte.gz", gzip(&images(&test)));
    file(&folder, "t10k-labels-idx1-ubyte", labels(&test));
    folder
}

#[test]
fn train_is_reproducible_and_eval_and_serve_take_its_file() {
    let data = data_set(200, 100);
    let elsewhere = folder();
    for file in std::fs::read_dir(data.path()).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), elsewhere.path().join(file.file_name())).unwrap();
    }
    let (data, elsewhere) = (text(data.path()), text(elsewhere.path()));
    let train = |out: &TempDir, data: &str, name: &str| {
        let args = ["train", "--features", "raw", "--c", "0.01", "--data", data];
        let args = [&args[..], &["--out", name]].concat();
        let printed = run_with(&args, |command| {
            command.current_dir(out.path());
        })
        .succeeded();
        assert!(printed.contains(&format!("wrote {name}")), "{printed}");
        std::fs::read(out.path().join(name)).unwrap()
    };
    let (one, two) = (folder(), folder());
    let bytes = train(&one, &data, "model.safetensors");
    assert!(bytes == train(&two, &elsewhere, "other.safetensors"), "the paths are in the file");
    let path = text(one.path().join("model.safetensors"));
    let model = Model::read(path.as_ref()).unwrap();

    let printed = run(&["eval", "--model", &path, "--data", &data]).succeeded();
    assert!(printed.contains(&model.digest().to_string()), "{printed}");
    let digits = Population::drawn(32, 100);
    let labels = digits.labels().unwrap();
    let wrong = |&i: &usize| model.classify(digits.image(i)).unwrap() != labels[i];
    let wrong = (0..100).filter(wrong).count();
    assert!(wrong < 50, "{wrong} of 100 wrong: nothing was learned");
    assert!(printed.contains(&format!("{wrong} of 100")), "{wrong} wrong, and it says\n{printed}");
    for word in ["precision", "recall"] {
        assert!(printed.to_lowercase().contains(word), "{printed}");
    }

    let sheet = text(one.path().join("worst.png"));
    let asked = ["--worst", &sheet, "--worst-count", "12"];
    let eval = [&["eval", "--model", &path, "--data", &data], &asked[..]].concat();
    let printed = run(&eval).succeeded();
    assert!(printed.contains(&format!("wrote {sheet}: the 12 worst of 100")), "{printed}");
    assert!(Image::read(sheet.as_ref()).unwrap().shape().len() > 12 * 112 * 112);
    let json = run(&[&eval[..], &["--json"]].concat()).succeeded();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["images"], &json["wrong"]), (&100.into(), &wrong.into()));
    assert_eq!(json["model"], model.digest().to_string());
    let worst = json["worst"].as_array().unwrap();
    assert_eq!(worst.len(), 12);
    assert!(worst[..wrong.min(12)].iter().all(|example| example["label"] != example["answer"]));
    let many = ["--worst", &sheet, "--worst-count", "1001"];
    let line = run(&[&["eval", "--model", &path, "--data", &data], &many[..]].concat());
    let line = line.failed_with_no_more_than_logs();
    assert!(line.contains("--worst-count"), "{line}");
    let nowhere = ["--worst", "/no/such/folder/worst.png"];
    let line = run(&[&["eval", "--model", &path, "--data", &data], &nowhere[..]].concat());
    assert!(line.failed_with_no_more_than_logs().contains("/no/such/folder"), "it names the file");

    let service = Running::start(&["serve", "--memory", "8MiB", "--model", &path]);
    assert_eq!(welcome(&service).digest, model.digest().0);
    let demo = run(&["demo", "--data", &data, "--model", "raw", "--classifier-time", "1ms"]);
    let demo = demo.succeeded();
    assert!(demo.contains("100 MNIST test digits"), "{demo}");
}

#[test]
fn train_refuses_what_it_cannot_learn_from_in_one_line() {
    let data = data_set(20, 10);
    let place = text(data.path());
    for (args, named) in [
        (&["--c=-1"][..], "C is -1"),
        (&["--c", "NaN"], "C is NaN"),
        (&["--out", "/no/such/folder/model"], "/no/such/folder/model"),
        // A rename would replace the device.
        (&["--out", "/dev/null"], "/dev/null: it is not a regular file"),
        (&["--out", &place], "it is a folder"),
        // Checked before the data, which takes minutes to learn from.
        (&["--data", "/no/such/data", "--out", "/no/such/folder/model"], "/no/such/folder/model"),
    ] {
        let data = if args.contains(&"--data") { &[][..] } else { &["--data", &place][..] };
        let line = run(&[&["train", "--features", "raw"][..], data, args].concat())
            .failed_with_no_more_than_logs();
        assert!(line.contains(named), "{line}");
    }
    // No test images.
    for (name, dims) in
        [("t10k-images-idx3-ubyte", &[0, 28, 28][..]), ("t10k-labels-idx1-ubyte", &[0])]
    {
        let folder = data.path().join("empty");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name), idx(dims, &[])).unwrap();
    }
    let empty = text(data.path().join("empty"));
    let line = run(&["eval", "--model", "raw", "--data", &empty]).failed_with_no_more_than_logs();
    assert!(line.contains("it has no images"), "{line}");
    // A file that is cut short.
    let labels = data.path().join("t10k-labels-idx1-ubyte");
    std::fs::write(&labels, &std::fs::read(&labels).unwrap()[..12]).unwrap();
    let line = run(&["eval", "--model", "raw", "--data", &place]).failed_with_no_more_than_logs();
    assert!(line.contains("t10k-labels-idx1-ubyte"), "{line}");
}

#[test]
fn the_demo_shows_the_gain_of_a_memo() {
    let printed = run(&["demo", "--images", "50", "--model", "raw"]).succeeded();
    for figure in [
        "a classifier that takes 20.0 ms an image",
        "50 drawn digits, one at a time",
        "first time",
        "second time",
        "256 in flight",
        "waiting time saved: ",
        "classifier time saved: ",
        "second answers equal to the first: 50 of 50",
        "classification errors:",
        "a memo gains little",
    ] {
        assert!(printed.contains(figure), "{figure:?} in\n{printed}");
    }
    let first = printed.lines().find(|line| line.contains("first time")).unwrap();
    let p50: f64 = first.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!(p50 >= 20.0 && first.contains(" ms"), "{first}");
    let speed_up = printed.lines().find(|line| line.contains("speed-up")).unwrap();
    let p50: f64 = speed_up.split_whitespace().nth(1).unwrap().replace(',', "").parse().unwrap();
    assert!(p50 > 2.0, "{printed}");
}

#[test]
fn bench_measures_a_memo_and_a_cache_and_checks_their_answers() {
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let cache = Running::start(&["cache", "--memory", "8MiB"]);
    let few = ["--count", "2000", "--warmup", "0s", "--population", "100", "--depth", "16"];
    let report = |addr: &str, more: &[&str]| {
        let printed = run(&[&["bench", addr, "--json"][..], &few, more].concat()).succeeded();
        let mut record = serde_json::from_str::<serde_json::Value>(&printed).unwrap();
        record["runs"][0]["report"].take()
    };
    let of_memo = report(&memo.place(), &["--connections", "3", "--zipf", "1"]);
    assert_eq!((&of_memo["sent"], &of_memo["answered"]), (&2000.into(), &2000.into()));
    assert_eq!((&of_memo["wrong"], &of_memo["failed"]), (&0.into(), &0.into()));
    assert!(of_memo["hit_ratio"].as_f64().unwrap() > 0.5, "{of_memo:#}");
    let of_cache = report(&cache.place(), &["--prefill", "--read-share", "0.9"]);
    assert_eq!((&of_cache["sent"], &of_cache["wrong"]), (&2000.into(), &0.into()));
    assert_eq!(of_cache["hit_ratio"].as_f64(), Some(1.0), "{of_cache:#}");
    // For people.
    let printed = run(&[&["bench", &memo.place()][..], &few].concat()).succeeded();
    assert!(printed.contains("p99"), "{printed}");
}

#[test]
fn stats_shows_each_service_for_people() {
    for (command, parts) in [
        ("serve", &["memo ", "Store: embedded", "Classifier: embedded", "Label table"][..]),
        ("cache", &["cache ", "Label table", "capacity"]),
        ("classifier", &["classifier "]),
    ] {
        let service = Running::start(&[command]);
        let printed = run(&["stats", "--over", "0s", "--server", &service.place()]).succeeded();
        for part in parts.iter().chain(&["up ", "Connections", "accepted"]) {
            assert!(printed.contains(part), "{command}: {part:?} in\n{printed}");
        }
        assert!(!printed.contains('_'), "raw names are for --json:\n{printed}");
    }
}

fn pgm_text(pixels: &[u8], width: usize) -> Vec<u8> {
    let mut text = format!("P2\n# drawn\n{width} {}\n255\n", pixels.len() / width);
    for row in pixels.chunks(width) {
        for pixel in row {
            write!(text, "{pixel} ").unwrap();
        }
        text.push('\n');
    }
    text.into_bytes()
}

fn png(pixels: &[u8], width: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, pixels.len() as u32 / width);
    encoder.set_color(png::ColorType::Grayscale);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(pixels).unwrap();
    writer.finish().unwrap();
    bytes
}

/// The columns of a line of `classify`: label, origin, and the file's name at its end.
fn columns(line: &str) -> (u16, &str, &str) {
    let mut words = line.split_whitespace();
    let (label, origin) = (words.next().unwrap(), words.next().unwrap());
    let micros: f64 = words.next().unwrap().parse().unwrap();
    assert!(micros > 0.0 && words.next() == Some("µs"), "{line:?}");
    (label.parse().unwrap(), origin, words.next().unwrap())
}

#[test]
fn classify_reads_every_format_and_shows_hits() {
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let server = memo.place();
    let (digits, labels) = answered(21, 5, &Model::raw());
    let (of, one) = (|i| digits.image(i), [1, 28, 28]);
    let files = [
        file(&folder, "0.png", png(of(0), 28)),
        file(&folder, "1.pgm", pgm_binary(of(1), 28)),
        file(&folder, "2.pgm", pgm_text(of(2), 28)),
        file(&folder, "3.idx", idx(&one, of(3))),
        file(&folder, "4.idx.gz", gzip(&idx(&one, of(4)))),
    ];
    for expected in ["miss", "hit"] {
        let mut args = vec!["classify", "--server", &server];
        args.extend(files.iter().map(String::as_str));
        let printed = run(&args).succeeded();
        assert_eq!(printed.lines().count(), files.len(), "{printed}");
        for ((line, file), &label) in printed.lines().zip(&files).zip(&labels) {
            assert_eq!(columns(line), (label, expected, file.as_str()));
        }
    }
    // The same digit in another format is the same image.
    let again = file(&folder, "again.png", png(of(1), 28));
    let printed = run(&["classify", "--server", &server, &again]).succeeded();
    assert_eq!(columns(printed.trim_end()), (labels[1], "hit", again.as_str()));
    // Dark on light, inverted, is the same image.
    let dark: Vec<u8> = of(0).iter().map(|pixel| 255 - pixel).collect();
    let dark = file(&folder, "dark.png", png(&dark, 28));
    let printed = run(&["classify", "--server", &server, "--invert", &dark]).succeeded();
    assert_eq!(columns(printed.trim_end()), (labels[0], "hit", dark.as_str()));
    let printed = run(&["classify", "--server", &server, &dark]).succeeded();
    assert_eq!(
        columns(printed.trim_end()).1,
        "miss",
        "an opaque image is inverted on request only"
    );
}

/// A file of one colour type and depth with the digit drawn in black on a transparent ground.
fn black_on_transparent(digit: &[u8], color: png::ColorType, depth: png::BitDepth) -> Vec<u8> {
    use png::ColorType::{GrayscaleAlpha, Indexed, Rgba};
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 28, 28);
    encoder.set_color(color);
    encoder.set_depth(depth);
    let wide = depth == png::BitDepth::Sixteen;
    let samples: Vec<u8> = match color {
        GrayscaleAlpha | Rgba => {
            let black = if color == Rgba { 3 } else { 1 };
            let sample = |value: u8| if wide { vec![value; 2] } else { vec![value] };
            digit.iter().flat_map(|&ink| [sample(0).repeat(black), sample(ink)].concat()).collect()
        }
        Indexed => {
            // Each index is black with the index's opacity.
            encoder.set_palette(vec![0; 3 * 256]);
            encoder.set_trns((0..=255).collect::<Vec<u8>>());
            digit.to_vec()
        }
        _ => {
            // One grey is transparent: the ground's. Ink is dark.
            let channels = if color == png::ColorType::Rgb { 3 } else { 1 };
            encoder.set_trns([0, 255].repeat(channels));
            digit.iter().flat_map(|&ink| vec![255 - ink; channels]).collect()
        }
    };
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(&samples).unwrap();
    writer.finish().unwrap();
    bytes
}

#[test]
fn a_black_digit_on_transparent_gets_its_label() {
    use png::BitDepth::{Eight, Sixteen};
    use png::ColorType::{Grayscale, GrayscaleAlpha, Indexed, Rgb, Rgba};
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB"]);
    let server = memo.place();
    let (digits, labels) = answered(23, 3, &Model::shipped());
    for (color, depth) in [
        (GrayscaleAlpha, Eight),
        (GrayscaleAlpha, Sixteen),
        (Rgba, Eight),
        (Rgba, Sixteen),
        (Indexed, Eight),
        (Grayscale, Eight),
        (Rgb, Eight),
    ] {
        for (i, &label) in labels.iter().enumerate() {
            let bytes = black_on_transparent(digits.image(i), color, depth);
            let path = file(&folder, "digit.png", bytes);
            for flags in [&[][..], &["--invert"], &["--invert=auto"]] {
                let args = [&["classify", "--server", &server][..], flags, &[&path]].concat();
                let printed = run(&args).succeeded();
                assert_eq!(columns(printed.trim_end()).0, label, "{color:?} {depth:?} {flags:?}");
            }
        }
    }
    // Composited on white and not inverted: other bytes than before.
    let printed = run(&[
        "classify",
        "--server",
        &server,
        "--invert=never",
        &text(folder.path().join("digit.png")),
    ])
    .succeeded();
    assert_eq!(columns(printed.trim_end()).1, "miss");
}

#[test]
fn classify_asks_about_every_image_of_an_idx_file_up_to_a_limit() {
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let server = memo.place();
    let (digits, labels) = answered(22, 6, &Model::raw());
    let bytes = idx(&[6, 28, 28], digits.bytes());
    for path in [file(&folder, "six.idx", &bytes), file(&folder, "six.idx.gz", gzip(&bytes))] {
        let printed = run(&["classify", "--server", &server, &path]).succeeded();
        let classes: Vec<u16> = printed.lines().map(|line| columns(line).0).collect();
        assert_eq!(classes, labels, "{printed}");
        let printed = run(&["classify", "--server", &server, "--limit", "2", &path]).succeeded();
        assert_eq!(printed.lines().count(), 2, "{printed}");
        assert!(printed.lines().all(|line| columns(line).1 == "hit"), "{printed}");
    }
}

#[test]
fn classify_names_each_bad_file_and_does_the_rest() {
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let server = memo.place();
    let small = file(&folder, "small.pgm", pgm_binary(&[0; 27 * 27], 27));
    let text_file = file(&folder, "notes.txt", "this is not an image");
    let photo = file(&folder, "photo.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF");
    let missing = text(folder.path().join("missing.png"));
    let labels = file(&folder, "labels.idx", idx(&[2], &[7, 2]));
    let empty = file(&folder, "empty.idx", idx(&[0, 28, 28], &[]));
    let good = file(&folder, "good.png", png(&[0; 784], 28));
    for (bad, words) in [
        (&small, &["27×27", "28×28"][..]),
        (&text_file, &["PNG, PGM or IDX"]),
        (&photo, &["a JPEG image", "convert it to PNG"]),
        (&text(folder.path()), &["it is a folder"]),
        (&labels, &["it is a label file"]),
        (&empty, &["it has no images"]),
        (&missing, &["No such file"]),
    ] {
        let done = run(&["classify", "--server", &server, bad, &good]);
        assert_eq!(done.status.code(), Some(1), "{done:#?}");
        let line = done.stderr.lines().next().unwrap();
        assert!(line.contains(bad.as_str()), "{done:#?}");
        for word in words {
            assert!(line.contains(word), "{done:#?}");
        }
        assert_eq!(done.stderr.lines().count(), 2, "one line for the file, one for the command");
        assert_eq!(line.matches(bad.as_str()).count(), 1, "it is named once: {line}");
        assert_eq!(columns(done.stdout.trim_end()).2, good, "the other file is done");
    }
}

#[test]
fn classify_reads_the_files_before_it_connects() {
    // It accepts no connection: a connect succeeds, and then nothing comes.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = silent.local_addr().unwrap().to_string();
    let folder = folder();
    let bad = file(&folder, "notes.txt", "this is not an image");
    let done = run(&["classify", "--server", &server, "--timeout", "60s", &bad, &bad]);
    assert_eq!(done.status.code(), Some(1), "{done:#?}");
    let lines: Vec<_> = done.stderr.lines().collect();
    assert!(lines[0].contains("PNG, PGM or IDX"), "{lines:?}");
    assert!(lines[2].contains("2 of 2 files failed"), "{lines:?}");
    silent.set_nonblocking(true).unwrap();
    assert!(silent.accept().is_err(), "no connection was made");
}

#[test]
fn the_example_image_is_a_seven() {
    let image = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/seven.png");
    for model in ["shipped", "raw"] {
        let memo = Running::start(&["serve", "--memory", "8MiB", "--model", model]);
        let printed = run(&["classify", "--server", &memo.place(), image]).succeeded();
        assert_eq!(columns(printed.trim_end()).0, 7, "{model}: {printed}");
    }
}

#[test]
fn a_model_is_written_through_a_link() {
    let data = data_set(20, 10);
    let (real, link) = (data.path().join("real.safetensors"), data.path().join("link"));
    std::fs::write(&real, "old").unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    let (place, out) = (text(data.path()), text(&link));
    run(&["train", "--features", "raw", "--c", "1", "--data", &place, "--out", &out]).succeeded();
    assert!(link.is_symlink());
    run(&["eval", "--model", &text(&real), "--data", &place]).succeeded();
}

#[test]
fn a_file_that_is_no_model_suggests_import() {
    let readme = concat!(env!("CARGO_MANIFEST_DIR"), "/README.md");
    let line = run(&["classifier", "--listen", "127.0.0.1:0", "--model", readme])
        .failed_with_no_more_than_logs();
    assert!(line.contains(readme) && line.contains("afterimage import FILE"), "{line}");
}
