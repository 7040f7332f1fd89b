//! The other commands: `train`, `eval`, `demo`, `bench`, `stats`.

use afterimage_bench::workload::Population;
use afterimage_classifier::Model;
use afterimage_classifier_tools::Image;
use tempfile::TempDir;

use crate::common::{Running, file, folder, run, run_with, text};

use crate::{gzip, idx, welcome};

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
    ] {
        let line = run(&[&["train", "--features", "raw", "--data", &place][..], args].concat())
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
