//! `POST /v1/classify`: the labels of one or several images.

#![expect(unused_qualifications, reason = "in code that utoipa generates")]

use std::sync::Arc;
use std::time::Instant;

use afterimage_core::{ClientId, Origin};
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Multipart, State};
use axum::http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Params, Whole};
use crate::openapi::Infers;
use crate::picture::{Picture, PictureError};
use crate::problem::Problem;
use crate::{Classified, Shared, Wish};

/// Bodies up to this size are decoded where they were read; larger ones on a thread of their own.
const SMALL: usize = 16 << 10;

/// The parameters in the query of a request.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(default, deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(crate) struct Options {
    /// How to fit pictures to the model.
    #[param(inline)]
    fit: Fit,
    /// Also answer with the score of each class.
    scores: bool,
    /// Also answer with the input that the model saw, in base64.
    input: bool,
}

/// How to fit pictures to the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Fit {
    /// As they are if they have the model's size, else as MNIST's digits were prepared.
    #[default]
    Auto,
    /// Always as MNIST's digits were prepared.
    Mnist,
    /// As they are; another size is an error.
    Exact,
}

/// The inputs of a request.
pub(crate) struct Inputs {
    pub(crate) images: Vec<Bytes>,
    /// Whether the client sent a list, and so expects one.
    is_list: bool,
}

/// The answer for one image.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Answer {
    /// The label.
    label: u16,
    /// `hit`, `miss` or `coalesced`.
    #[schema(value_type = Origins, inline)]
    origin: &'static str,
    /// One score for each class, with `scores=true`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    scores: Vec<f32>,
    /// The input that the model saw, in base64, with `input=true`.
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<String>,
}

/// The answer for a single image, with its time.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Single {
    #[serde(flatten)]
    answer: Answer,
    /// Microseconds from the decoded input to the answer.
    time_us: f64,
}

/// The answers for a list.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct List {
    /// One answer for each image, in order.
    results: Vec<Answer>,
    /// The number of hits among them.
    hits: usize,
    /// Microseconds from the decoded inputs to the answers.
    time_us: f64,
}

/// How an answer came about.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "only its schema is used")]
enum Origins {
    Hit,
    Miss,
    Coalesced,
}

/// An answer for one image, or for a list.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) enum Answers {
    Single(Single),
    List(List),
}

/// Images as JSON.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Images {
    /// Pictures or pixels, each in base64.
    #[schema(min_items = 1)]
    images: Vec<String>,
}

/// Files of a form.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Form {
    /// A picture or the pixels of an input. Other fields are further images.
    #[schema(format = Binary)]
    file: String,
}

/// A picture (PNG, JPEG, WebP, PNM) or the pixels of an input.
#[derive(ToSchema)]
#[schema(value_type = String, format = Binary)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Pixels(Vec<u8>);

/// Label one or several images.
///
/// One image is the body itself: a picture (PNG, JPEG, WebP, PNM) or the pixels of an input.
/// JSON and forms hold several. `Cache-Status` of the response says how the store was used.
#[utoipa::path(
    post, path = "/v1/classify", tag = "classify", params(
        Options,
        ("Cache-Control" = Option<String>, Header,
            description = "`no-cache` computes anew, `no-store` stores nothing"),
    ),
    request_body(content(
        (Pixels = "application/octet-stream"), (Pixels = "image/png"), (Pixels = "image/jpeg"),
        (Images = "application/json"), (Form = "multipart/form-data"),
    )),
    responses(
        (status = 200, description = "The answer, or the answers in order", body = Answers),
        Infers,
    ),
)]
pub(crate) async fn classify(
    State(shared): State<Arc<Shared>>,
    Extension(client): Extension<ClientId>,
    Params(options): Params<Options>,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Result<Response, Problem> {
    let Inputs { images, is_list } = images(&shared, &options, &headers, body).await?;
    let directives = directives(&headers);
    let wish = Wish { scores: options.scores, client, ..directives };
    let since = Instant::now();
    let answers = shared.source.classify(images.clone(), wish).await?;
    let time_us = since.elapsed().as_nanos() as f64 / 1000.0;
    let status = cache_status(&answers, wish);
    let hits = answers.iter().filter(|answer| answer.origin == Origin::Hit).count();
    let mut results =
        answers.into_iter().zip(images).map(|(Classified { label, scores, origin }, image)| {
            let input = options.input.then(|| BASE64_STANDARD.encode(image));
            Answer { label, origin: name(origin), scores, input }
        });
    let mut response = match is_list {
        true => Json(List { results: results.collect(), hits, time_us }).into_response(),
        false => {
            let answer = results.next().ok_or_else(|| {
                Problem::new(StatusCode::BAD_GATEWAY, "upstream_corrupt", "there is no answer")
            })?;
            Json(Single { answer, time_us }).into_response()
        }
    };
    let out = response.headers_mut();
    out.insert("cache-status", status);
    // An answer can be deleted from the store, so nothing between here and the client may keep it.
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

fn name(origin: Origin) -> &'static str {
    match origin {
        Origin::Hit => "hit",
        Origin::Miss => "miss",
        Origin::Coalesced => "coalesced",
    }
}

/// How the store was used, as RFC 9211 writes it.
pub(crate) fn cache_status(answers: &[Classified], wish: Wish) -> HeaderValue {
    let of = |origin| answers.iter().filter(|answer| answer.origin == origin).count();
    let (all, hits) = (answers.len(), of(Origin::Hit));
    let stored = if wish.no_store { "" } else { "; stored" };
    let text = match () {
        () if hits == all => "afterimage; hit".to_owned(),
        () if wish.refresh => format!("afterimage; fwd=request{stored}"),
        () if hits > 0 => {
            format!("afterimage; fwd=partial{stored}; detail=\"{hits} of {all} hits\"")
        }
        () if of(Origin::Coalesced) == all => "afterimage; fwd=miss; collapsed".to_owned(),
        () => format!("afterimage; fwd=miss{stored}"),
    };
    HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("afterimage"))
}

/// What `Cache-Control` of the request asks for.
pub(crate) fn directives(headers: &HeaderMap) -> Wish {
    let has = |wanted: &str| {
        let values = headers.get_all(header::CACHE_CONTROL).iter();
        let mut parts =
            values.filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(','));
        parts.any(|part| part.trim().eq_ignore_ascii_case(wanted))
    };
    Wish { refresh: has("no-cache"), no_store: has("no-store"), ..Wish::default() }
}

/// The images in a body: a picture, raw pixels, a form with files, or JSON.
pub(crate) async fn images(
    shared: &Shared,
    options: &Options,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<Inputs, Problem> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("");
    let kind = kind.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    let (encoded, is_list) = match &*kind {
        "application/json" => (from_json(&body)?, true),
        "multipart/form-data" => (from_form(headers, body).await?, true),
        // A client that says nothing, or something else, sends a picture or pixels: `curl -d` calls
        // any body a form.
        _ => (vec![body], false),
    };
    if encoded.is_empty() {
        return Err(Problem::bad_request("no_image", "the request has no image"));
    }
    let limit = shared.options.max_images;
    if encoded.len() > limit {
        let detail = format!("the request has {} images; the limit is {limit}", encoded.len());
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", detail));
    }
    let model = shared.known_model()?;
    let side = model.input.as_ref().and_then(|shape| match *shape.dims() {
        [height, width] if height == width => Some(height as usize),
        _ => None,
    });
    let len = model.input_len();
    let fit = options.fit;
    let is_small = encoded.iter().map(Bytes::len).sum::<usize>() <= SMALL;
    let prepare = move || -> Result<Vec<Bytes>, Problem> {
        encoded.into_iter().map(|image| input(image, side, len, fit)).collect()
    };
    let images = if is_small {
        prepare()?
    } else {
        let permit = Arc::clone(&shared.decodes).acquire_owned().await;
        let prepared = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            prepare()
        });
        prepared.await.map_err(|_| {
            let detail = "an image could not be decoded because of a fault in its decoder";
            Problem::bad_request("bad_image", detail)
        })??
    };
    Ok(Inputs { images, is_list })
}

/// One input of the model, from pixels or a picture.
fn input(
    image: Bytes,
    side: Option<usize>,
    len: Option<usize>,
    fit: Fit,
) -> Result<Bytes, Problem> {
    if !Picture::is_encoded(&image) {
        return match len {
            Some(expected) if image.len() != expected => {
                let found = image.len();
                let detail = format!(
                    "the body is neither a picture (PNG, JPEG, WebP, PNM) nor the pixels of an \
                     input: it has {found} bytes, and an input has {expected}"
                );
                Err(Problem::bad_request("bad_image", detail))
            }
            _ => Ok(image),
        };
    }
    let Some(side) = side else {
        let detail = "the model does not take square pictures; send the bytes of its input";
        return Err(Problem::unsupported_type(detail));
    };
    let picture = Picture::decode(&image)?;
    let (width, height) = picture.size();
    match fit {
        Fit::Auto | Fit::Exact if (width, height) == (side, side) => {
            Ok(picture.into_pixels().into())
        }
        Fit::Exact => {
            let detail = format!(
                "the image has {width} × {height} pixels and the model takes {side} × {side}; \
                 leave fit=exact out to have it scaled"
            );
            Err(Problem::bad_request("bad_image", detail))
        }
        Fit::Auto | Fit::Mnist => Ok(picture.like_mnist(side)?.into()),
    }
}

impl From<PictureError> for Problem {
    fn from(error: PictureError) -> Self {
        match error {
            PictureError::TooLarge => {
                Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", error.to_string())
            }
            PictureError::Format => Problem::unsupported_type(error.to_string()),
            PictureError::Decode(ref cause) => {
                Problem::bad_request("bad_image", format!("{error}: {cause}"))
            }
            PictureError::Blank => Problem::bad_request("blank_image", error.to_string()),
        }
    }
}

/// The images of `{"images": ["base64", …]}`.
fn from_json(body: &[u8]) -> Result<Vec<Bytes>, Problem> {
    let Images { images } = serde_json::from_slice(body).map_err(|error| {
        let detail = format!("the body is not {{\"images\": [\"BASE64\", …]}}: {error}");
        Problem::bad_request("bad_json", detail)
    })?;
    let decode = |(i, image): (usize, String)| {
        let decoded = BASE64_STANDARD.decode(image);
        decoded.map(Bytes::from).map_err(|error| {
            Problem::bad_request("bad_json", format!("images[{i}] is not base64: {error}"))
        })
    };
    images.into_iter().enumerate().map(decode).collect()
}

/// The files of a form.
async fn from_form(headers: &HeaderMap, body: Bytes) -> Result<Vec<Bytes>, Problem> {
    let bad = |error: &dyn std::fmt::Display| {
        Problem::bad_request("bad_form", format!("the form cannot be read: {error}"))
    };
    let mut request = Request::new(Body::from(body));
    *request.headers_mut() = headers.clone();
    // The body is in memory already, within the gateway's limit.
    DefaultBodyLimit::disable().apply(&mut request);
    let mut form = Multipart::from_request(request, &()).await.map_err(|error| bad(&error))?;
    let mut images = Vec::new();
    while let Some(field) = form.next_field().await.map_err(|error| bad(&error))? {
        images.push(field.bytes().await.map_err(|error| bad(&error))?);
    }
    Ok(images)
}
