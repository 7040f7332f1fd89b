//! `classify`, and the formats that it reads.

use std::fmt::Write as _;

use afterimage_classifier::Model;

use crate::common::{Running, answered, file, folder, run, text};

use crate::{gzip, idx, pgm_binary};

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
    let missing = text(folder.path().join("missing.png"));
    let labels = file(&folder, "labels.idx", idx(&[2], &[7, 2]));
    let empty = file(&folder, "empty.idx", idx(&[0, 28, 28], &[]));
    let good = file(&folder, "good.png", png(&[0; 784], 28));
    for (bad, words) in [
        (&small, &["27×27", "28×28"][..]),
        (&text_file, &["PNG, PGM or IDX"]),
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
