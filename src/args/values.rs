//! Types of flag values: store and classifier addresses, sizes, times and shares.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::Duration;

use afterimage_inference::ModelUrl;
use afterimage_wire::proto::infer::MAX_NAME_LEN;
use anyhow::bail;

use crate::net;

/// Where a memo keeps its answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StoreAddr {
    /// A table in the memo's own process.
    Embedded,
    /// A cache service at this HOST:PORT.
    Cache(String),
    /// A Redis or Valkey server, or a cluster of them, at this URL.
    Redis(String),
}

impl FromStr for StoreAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected embedded, HOST:PORT of a cache service, or a URL such as redis://127.0.0.1:6379";
        if text == "embedded" {
            return Ok(StoreAddr::Embedded);
        }
        match text.split_once("://") {
            Some(("redis" | "redis+cluster" | "rediss" | "rediss+cluster", _)) => {
                Ok(StoreAddr::Redis(text.to_owned()))
            }
            Some(("valkey" | "valkeys", _)) => Err(format!(
                "Valkey has the URLs of Redis: write redis:// or rediss://; {EXPECTED}"
            )),
            Some((scheme, _)) if scheme.contains("unix") || scheme.contains("socket") => {
                Err(format!("Unix sockets are not supported; {EXPECTED}"))
            }
            Some(_) => Err(EXPECTED.into()),
            None if text.contains(':') => net::parse(text).map(StoreAddr::Cache),
            None => Err(EXPECTED.into()),
        }
    }
}

/// Where a memo's classifier runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClassifierAddr {
    /// In the memo's own process.
    Embedded,
    /// A classifier service at this HOST:PORT.
    Remote(String),
    /// A model of a model server, at this URL.
    Server(Box<ModelUrl>),
}

impl FromStr for ClassifierAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected embedded, HOST:PORT such as 127.0.0.1:7402, or \
                                http://HOST:PORT/v2/models/NAME";
        if text == "embedded" {
            return Ok(ClassifierAddr::Embedded);
        }
        match text.split_once("://") {
            Some(("http" | "https", _)) => {
                let url = text.parse().map_err(|error| {
                    format!("{error}; for all models of a server use: afterimage proxy")
                });
                Ok(ClassifierAddr::Server(Box::new(url?)))
            }
            Some((scheme, _)) if scheme.starts_with("redis") => {
                Err(format!("Redis is a store and cannot classify; {EXPECTED}"))
            }
            Some(_) => Err(EXPECTED.into()),
            None if text.contains(':') => net::parse(text).map(ClassifierAddr::Remote),
            None => Err(EXPECTED.into()),
        }
    }
}

/// The classifiers of one model: `[MODEL=]ADDR[,ADDR…]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Classifiers {
    pub(crate) model: Option<String>,
    pub(crate) addresses: Vec<ClassifierAddr>,
}

impl FromStr for Classifiers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (model, addresses) = of_model(text)?;
        let addresses = addresses.split(',').map(str::parse).collect::<Result<_, _>>()?;
        Ok(Classifiers { model, addresses })
    }
}

/// A value for one model, `MODEL=VALUE`, or for all, `VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OfModel<T> {
    pub(crate) model: Option<String>,
    pub(crate) value: T,
}

impl<T: FromStr<Err = String>> FromStr for OfModel<T> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (model, value) = of_model(text)?;
        Ok(OfModel { model, value: value.parse()? })
    }
}

/// Splits `MODEL=VALUE`. The value may contain `=`, if a character before it cannot be in a name.
fn of_model(text: &str) -> Result<(Option<String>, &str), String> {
    let is_name = |c: char| c.is_alphanumeric() || "-_./ ".contains(c);
    match text.split_once('=') {
        Some(("", _)) => Err("the name before = is empty".into()),
        Some((name, _)) if name.len() > MAX_NAME_LEN => {
            Err(format!("the name has {} bytes; the limit is {MAX_NAME_LEN}", name.len()))
        }
        Some((name, value)) if name.chars().all(is_name) => Ok((Some(name.to_owned()), value)),
        _ => Ok((None, text)),
    }
}

/// One in N: `1/1000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Share(pub(crate) NonZeroU32);

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one_in = text.strip_prefix("1/").and_then(|many| many.parse().ok());
        one_in.map(Share).ok_or_else(|| "expected 1/N, for example 1/1000".into())
    }
}

/// A number of bytes: `64KiB`, `256MiB`, `2GB`, `1000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl Size {
    /// Reads a size for a limit with which nothing would fit at zero.
    pub(crate) fn above_zero(text: &str) -> Result<Self, String> {
        match text.parse()? {
            Size(0) => Err("it must be greater than zero".into()),
            size => Ok(size),
        }
    }

    pub(crate) fn within(self, name: &str, limit: u32) -> anyhow::Result<u32> {
        match u32::try_from(self.0) {
            Ok(size) if size <= limit => Ok(size),
            _ => bail!("{name} is {self}; the limit is {}", Size(limit.into())),
        }
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size = text.parse::<bytesize::ByteSize>();
        size.map(|size| Size(size.as_u64()))
            .map_err(|_| "expected a number of bytes, for example 64KiB, 256MiB or 2GB".into())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", bytesize::ByteSize(self.0).display().iec())
    }
}

/// The longest time that a flag accepts.
const MAX_TIME: Duration = Duration::from_secs(366 * 24 * 3600);

/// A length of time above zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span(pub(crate) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse()? {
            Time(Duration::ZERO) => Err("it must be greater than zero".into()),
            Time(time) => Ok(Span(time)),
        }
    }
}

/// A length of time: `200us`, `2ms`, `5s`, `1m 30s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Time(pub(crate) Duration);

impl FromStr for Time {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let time = humantime::parse_duration(text)
            .map_err(|_| "expected a number with a unit, for example 200us, 2ms, 5s or 1m 30s")?;
        if time > MAX_TIME {
            return Err("it must be at most one year".into());
        }
        Ok(Time(time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read_as_people_write_them() {
        assert_eq!("256MiB".parse(), Ok(Size(256 << 20)));
        assert_eq!("1000".parse(), Ok(Size(1000)));
        assert_eq!("200us".parse::<Time>().unwrap().0, Duration::from_micros(200));
        assert!("".parse::<Size>().is_err() && "2 parsecs".parse::<Time>().is_err());
        assert!("300000000000y".parse::<Time>().is_err() && "0s".parse::<Span>().is_err());
        let error = Size(5 << 30).within("--max-body", 1 << 30).unwrap_err();
        assert_eq!(error.to_string(), "--max-body is 5.0 GiB; the limit is 1.0 GiB");
    }

    #[test]
    fn a_share_is_one_in_so_many() {
        assert_eq!("1/1000".parse(), Ok(Share(NonZeroU32::new(1000).unwrap())));
        for wrong in ["", "1", "2/3", "1/0", "1/x", "0.1", "1/-1"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_store_is_embedded_a_cache_or_redis() {
        assert_eq!("embedded".parse(), Ok(StoreAddr::Embedded));
        assert_eq!("[::1]:7401".parse(), Ok(StoreAddr::Cache("[::1]:7401".into())));
        let url = "rediss+cluster://a:1,b:2";
        assert_eq!(url.parse(), Ok(StoreAddr::Redis(url.into())));
        for wrong in ["redisss://h:1", "http://h:1", "", "here", ":7401", "localhost:port"] {
            let error = wrong.parse::<StoreAddr>().unwrap_err();
            assert!(error.contains("expected"), "{wrong:?}: {error}");
        }
        for (wrong, expected) in [
            ("valkey://h", "write redis://"),
            ("unix:///run/redis.sock", "Unix sockets are not supported"),
            ("redis+socket:///run/redis.sock", "Unix sockets are not supported"),
        ] {
            let error = wrong.parse::<StoreAddr>().unwrap_err();
            assert!(error.contains(expected), "{wrong:?}: {error}");
        }
        assert!("foo".parse::<StoreAddr>().unwrap_err().contains("redis://127.0.0.1:6379"));
    }

    #[test]
    fn a_value_is_for_one_model_or_for_all() {
        let addr = |text: &str| ClassifierAddr::Remote(text.to_owned());
        let all: Classifiers = "a:1,b:2".parse().unwrap();
        assert_eq!((all.model, all.addresses), (None, vec![addr("a:1"), addr("b:2")]));
        let one: Classifiers = "faces/v2=a:1".parse().unwrap();
        assert_eq!((one.model.as_deref(), one.addresses), (Some("faces/v2"), vec![addr("a:1")]));
        let ttl: OfModel<Span> = "faces=10m".parse().unwrap();
        assert_eq!((ttl.model.as_deref(), ttl.value.0.as_secs()), (Some("faces"), 600));
        for wrong in ["=a:1", "faces=", "faces=a:1,,b:2", "http://h/?a=b"] {
            assert!(wrong.parse::<Classifiers>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_classifier_is_embedded_or_an_address() {
        assert_eq!("embedded".parse(), Ok(ClassifierAddr::Embedded));
        assert_eq!("h:7402".parse(), Ok(ClassifierAddr::Remote("h:7402".into())));
        let url = "http://h:8000/v2/models/digits";
        let server = ClassifierAddr::Server(Box::new(url.parse().unwrap()));
        assert_eq!(url.parse(), Ok(server));
        for (wrong, expected) in [
            ("http://127.0.0.1:8000/predict", "expected http://HOST:PORT/v2/models/NAME"),
            ("redis://127.0.0.1", "Redis is a store and cannot classify"),
            ("there", "expected embedded, HOST:PORT"),
            ("ftp://h:1", "expected embedded, HOST:PORT"),
        ] {
            let error = wrong.parse::<ClassifierAddr>().unwrap_err();
            assert!(error.contains(expected), "{wrong:?}: {error}");
            assert!(!error.contains("redis://"), "{wrong:?}: {error}");
        }
    }
}
