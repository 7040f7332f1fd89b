//! TLS between real processes: on every listener, to every upstream, and with every tool.

use crate::common;
use std::time::{Duration, Instant};

use crate::common::{Running, file, folder, run, text};
use afterimage_testkit::pki::{Authority, Issued};
use rustix::process::Signal;
use tempfile::TempDir;

/// The authority of the servers and that of their clients, and what both have signed.
struct Pki {
    folder: TempDir,
    servers: Authority,
    clients: Authority,
    server: Issued,
    client: Issued,
}

impl Pki {
    fn new() -> Self {
        let folder = folder();
        let servers = Authority::new(folder.path(), "servers");
        let clients = Authority::new(folder.path(), "clients");
        let server = servers.issue("server", "127.0.0.1");
        let client = clients.issue("client", "somebody");
        Pki { folder, servers, clients, server, client }
    }

    /// The flags of a listener that requires certificates.
    fn listener(&self) -> Vec<String> {
        let Pki { server, clients, .. } = self;
        let files = [&server.cert, &server.key, &clients.cert].map(text);
        ["--tls-cert", "--tls-key", "--tls-client-ca"]
            .into_iter()
            .zip(files)
            .flat_map(|(flag, file)| [flag.to_owned(), file])
            .collect()
    }

    /// The flags of a client, with names that begin like this.
    fn client(&self, prefix: &str) -> Vec<String> {
        let Pki { client, servers, .. } = self;
        let mut flags = vec![format!("--{prefix}")];
        for (name, file) in [("ca", &servers.cert), ("cert", &client.cert), ("key", &client.key)] {
            flags.extend([format!("--{prefix}-{name}"), text(file)]);
        }
        flags
    }
}

fn with<'a>(command: &[&'a str], flags: &'a [Vec<String>]) -> Vec<&'a str> {
    let flags = flags.iter().flatten().map(String::as_str);
    command.iter().copied().chain(flags).collect()
}

#[test]
fn listeners_upstreams_and_tools_speak_mutual_tls() {
    let pki = Pki::new();
    let listener = [pki.listener()];
    let cache = Running::start(&with(&["cache", "--memory", "1MiB"], &listener));
    let classifier = Running::start(&with(&["classifier"], &listener));
    let (cache_at, classifier_at) = (cache.place(), classifier.place());
    let memo = ["memo", "--store", &cache_at, "--classifier", &classifier_at];
    let flags = [pki.listener(), pki.client("cache-tls"), pki.client("classifier-tls")];
    let memo = Running::start(&with(&memo, &flags));
    let place = memo.place();

    let image = format!("P2\n28 28\n255\n{}", "0 ".repeat(784));
    let image = file(&pki.folder, "image.pgm", image);
    let tls = [pki.client("tls")];
    let classify = with(&["classify", &image, &image, "--server", &place], &tls);
    let deadline = Instant::now() + common::PATIENCE;
    // The memo connects in the background.
    let labels = loop {
        let done = run(&classify);
        if done.status.success() || Instant::now() > deadline {
            break done.succeeded();
        }
    };
    assert_eq!(labels.lines().count(), 2, "{labels}");
    let bench = ["bench", &place, "--count", "200", "--depth", "8", "--population", "50"];
    let report = run(&with(&bench, &tls)).succeeded();
    assert!(report.contains("200"), "{report}");
    for service in [&place, &cache_at, &classifier_at] {
        let stats = run(&with(&["stats", service], &tls)).succeeded();
        assert!(stats.contains("TLS handshakes"), "{stats}");
    }

    // Without a certificate, without TLS, without trust: one clear line each.
    let ca = text(&pki.servers.cert);
    for (flags, why) in [
        (&["--tls", "--tls-ca", &ca][..], "the server asks for a client's certificate"),
        (&[], "this port speaks TLS"),
        (&["--tls", "--tls-ca", &text(&pki.clients.cert)], "invalid peer certificate"),
    ] {
        let line = run(&[&["stats", &place], flags].concat()).failed_with_a_line();
        assert!(line.contains(why), "{line}");
        let line = run(&[&["bench", &place, "--count", "1"], flags].concat()).failed_with_a_line();
        assert!(line.contains("cannot connect") || line.contains(why), "{line}");
    }
}

/// Waits until a service has written this to its log.
fn until_logged(service: &Running, what: &str) {
    let deadline = Instant::now() + common::PATIENCE;
    while !service.log().contains(what) {
        assert!(Instant::now() < deadline, "{what:?} is not logged");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn sighup_loads_new_certificates_and_rejects_broken_ones() {
    let pki = Pki::new();
    let Pki { server, .. } = &pki;
    let cert = (text(&server.cert), text(&server.key));
    let cache = ["cache", "--memory", "1MiB", "--tls-cert", &cert.0, "--tls-key", &cert.1];
    let cache = Running::start(&cache);
    let place = cache.place();
    let ask = |authority: &Authority| {
        run(&["stats", &place, "--tls", "--tls-ca", &text(&authority.cert)])
    };
    ask(&pki.servers).succeeded();
    ask(&pki.clients).failed_with_a_line();

    std::fs::write(&server.cert, "broken").unwrap();
    cache.signal(Signal::HUP);
    until_logged(&cache, "the certificates loaded before stay in use");
    assert!(cache.log().contains(&format!("{}: no certificate in PEM format", cert.0)));
    ask(&pki.servers).succeeded();

    // Signed by another authority, so that a client can tell.
    pki.clients.issue("server", "127.0.0.1");
    cache.signal(Signal::HUP);
    until_logged(&cache, "reloaded certificates");
    ask(&pki.clients).succeeded();
    ask(&pki.servers).failed_with_a_line();
}

#[test]
fn a_sighup_right_after_the_start_ends_no_service() {
    let pki = Pki::new();
    let (cert, key) = (text(&pki.server.cert), text(&pki.server.key));
    let cache = ["cache", "--memory", "1MiB", "--threads", "1"];
    let cache = Running::start(&[&cache[..], &["--tls-cert", &cert, "--tls-key", &key]].concat());
    cache.signal(Signal::HUP);
    until_logged(&cache, "reloaded certificates");
}

#[test]
fn sighup_reloads_the_certificates_of_a_redis_only_memo() {
    let pki = Pki::new();
    let ca = text(&pki.servers.cert);
    // No server needs to run there.
    for cache in ["rediss://127.0.0.1:1", "rediss+cluster://127.0.0.1:1"] {
        let memo = Running::start(&["memo", "--store", cache, "--store-tls-ca", &ca]);
        memo.signal(Signal::HUP);
        until_logged(&memo, &format!("reloaded certificates from {ca}"));
        std::fs::write(&ca, "broken").unwrap();
        memo.signal(Signal::HUP);
        until_logged(&memo, "the certificates loaded before stay in use");
        run(&["stats", &memo.place()]).succeeded();
        std::fs::copy(&pki.clients.cert, &ca).unwrap();
    }
}

#[test]
fn a_public_address_needs_authentication_besides_tls() {
    let pki = Pki::new();
    let (cert, key) = (text(&pki.server.cert), text(&pki.server.key));
    let cache = ["cache", "--memory", "1MiB", "--log", "warn", "--listen", "0.0.0.0:0"];
    let tls = ["--tls-cert", &cert, "--tls-key", &key];
    let line = run(&[&cache[..], &tls].concat()).failed_with_a_line();
    assert!(line.contains("without authentication"), "{line}");
    assert!(line.contains("--token-file or --tls-client-ca"), "{line}");

    let token = file(&pki.folder, "token", "sesame");
    let mutual = pki.listener();
    let mutual: Vec<&str> = mutual.iter().map(String::as_str).collect();
    for (flags, warns) in [
        (&mutual[..], false),
        (&[&tls[..], &["--token-file", &token]].concat(), false),
        (&["--token-file", &token], true),
    ] {
        let mut service = Running::start(&[&cache[..], flags].concat());
        service.kill();
        assert_eq!(service.log().contains("unencrypted"), warns, "{flags:?}");
    }
}

#[test]
fn tls_flags_without_effect_are_refused() {
    let pki = Pki::new();
    let (cert, key) = (text(&pki.server.cert), text(&pki.server.key));
    for (args, why) in [
        (&["cache", "--tls-cert", &cert][..], "--tls-cert needs --tls-key"),
        (&["cache", "--tls-key", &key], "--tls-key needs --tls-cert"),
        (&["cache", "--tls-client-ca", &cert], "--tls-client-ca needs --tls-cert"),
        (&["memo", "--store-tls"], "--store-tls needs a remote store"),
        (&["memo", "--store-tls-ca", &cert], "--store-tls-ca needs a remote store"),
        (&["memo", "--store-tls-name", "cache"], "--store-tls-name needs a remote store"),
        (&["memo", "--store-token-file", &cert], "--store-token-file needs a remote store"),
        (&["memo", "--classifier-tls"], "--classifier-tls needs a remote classifier"),
        (&["memo", "--classifier-tls-key", &key], "--classifier-tls-key needs a remote classifier"),
        (
            &["memo", "--classifier-token-file", &key],
            "--classifier-token-file needs a remote classifier",
        ),
        (
            &["memo", "--store", "redis://127.0.0.1:1", "--store-tls-key", &key],
            "--store-tls-key needs TLS; write rediss://",
        ),
        (
            &[
                "memo",
                "--store",
                "rediss://127.0.0.1:1",
                "--store-tls-ca",
                &cert,
                "--store-tls-key",
                &key,
            ],
            "the certificate is missing",
        ),
        (
            &["memo", "--store", "rediss+cluster://127.0.0.1:1", "--store-tls-ca", &key],
            "no certificate in PEM format",
        ),
        (
            &["memo", "--store", "127.0.0.1:1", "--store-tls-ca", &cert],
            "--store-tls-ca needs --store-tls",
        ),
        (&["stats", "--tls-name", "cache"], "--tls-name needs --tls"),
        (&["stats", "--tls", "--tls-ca", &key], "no certificate in PEM format"),
        (&["stats", "--tls", "--tls-ca", &cert, "--tls-cert", &cert], "the key is missing"),
    ] {
        let listen = if args[0] == "stats" { &[][..] } else { &["--listen", "127.0.0.1:0"] };
        let line = run(&[args, listen, &["--log", "error"]].concat()).failed_with_a_line();
        assert!(line.contains(why), "{line}");
    }
}

#[test]
fn a_secret_that_others_can_read_is_warned_of_at_the_start() {
    use std::os::unix::fs::PermissionsExt;
    let pki = Pki::new();
    let token = file(&pki.folder, "token", "sesame");
    let secret = file(&pki.folder, "secret", [7; 32]);
    let (cert, key) = (text(&pki.server.cert), text(&pki.server.key));
    let files = [("--token-file", &token), ("--secret-file", &secret), ("--tls-key", &key)];
    let memo = ["memo", "--token-file", &token, "--secret-file", &secret];
    let memo = [&memo[..], &["--tls-cert", &cert, "--tls-key", &key]].concat();
    for exposed in [None, Some(0), Some(1), Some(2)] {
        for (i, (_, file)) in files.iter().enumerate() {
            let mode = if exposed == Some(i) { 0o644 } else { 0o640 };
            std::fs::set_permissions(file, PermissionsExt::from_mode(mode)).unwrap();
        }
        let mut service = Running::start(&memo);
        service.kill();
        let log = service.log();
        for (i, (flag, file)) in files.iter().enumerate() {
            let warning =
                format!("{flag} {file}: every user of this machine can read or change it");
            assert_eq!(log.contains(&warning), exposed == Some(i), "{log}");
        }
        assert!(!log.contains("sesame"));
    }
}
