//! `classify`, and the formats that it reads.

use std::fmt::Write as _;

use afterimage_classifier::Model;

use crate::common::{Running, answered, file, folder, run, text};

use crate::shared::{gzip, idx, pgm_binary};

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
fn classify_reads_every_format_and_says_what_was_remembered() {
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
    for expected in ["computed", "remembered"] {
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
    assert_eq!(columns(printed.trim_end()), (labels[1], "remembered", again.as_str()));
    // Dark on light, turned round, is the same image, too.
    let dark: Vec<u8> = of(0).iter().map(|pixel| 255 - pixel).collect();
    let dark = file(&folder, "dark.png", png(&dark, 28));
    let printed = run(&["classify", "--server", &server, "--invert", &dark]).succeeded();
    assert_eq!(columns(printed.trim_end()), (labels[0], "remembered", dark.as_str()));
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
        assert!(printed.lines().all(|line| columns(line).1 == "remembered"), "{printed}");
    }
}

#[test]
fn classify_names_the_file_that_is_no_image_of_the_servers_size_and_does_the_rest() {
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let server = memo.place();
    let small = file(&folder, "small.pgm", pgm_binary(&[0; 27 * 27], 27));
    let text_file = file(&folder, "notes.txt", "this is not an image");
    let missing = text(folder.path().join("missing.png"));
    let good = file(&folder, "good.png", png(&[0; 784], 28));
    for (bad, words) in [
        (&small, &["27×27", "28×28"][..]),
        (&text_file, &["PNG, PGM or IDX"]),
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
