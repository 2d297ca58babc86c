//! A request's body, up to a limit of bytes and of patience.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::time::timeout;

use crate::error::ApiError;
use crate::fields::Fields;
use crate::settings::Settings;

/// What is read of a body that is too large before the refusal, so that a client that sends all of it
/// before it reads gets to see why.
const DRAINED: usize = 256 << 20;

/// The fields of a JSON body.
///
/// # Errors
/// 415 for another type, 413 above the limit, 408 from a client that stops sending, 400 for what is
/// no JSON object.
pub(crate) async fn read_json(request: Request, settings: &Settings) -> Result<Fields, ApiError> {
    // Asked for, because a page of another site may send a form or text without the browser's asking us.
    if !is_json(&request) {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body's type must be application/json; set the header Content-Type",
        ));
    }
    let announced = request.headers().get(header::CONTENT_LENGTH);
    let announced = announced.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let announced = announced.unwrap_or(0);
    if announced > settings.max_body && request.headers().contains_key(header::EXPECT) {
        // It asked before it sends, so nothing has to be read.
        return Err(too_large(settings.max_body));
    }
    let body = read(
        request.into_body(),
        settings.max_body,
        announced,
        settings.patience,
    );
    let body = timeout(settings.timeout, body).await;
    Fields::parse(&body.map_err(|_| too_slow())??)
}

fn is_json(request: &Request) -> bool {
    let kind = request.headers().get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    essence.eq_ignore_ascii_case("application/json")
}

async fn read(
    mut body: Body,
    limit: usize,
    announced: usize,
    patience: Duration,
) -> Result<Bytes, ApiError> {
    let mut bytes = BytesMut::new();
    let mut n_read = 0_usize;
    loop {
        let frame = timeout(patience, body.frame()).await;
        let Some(frame) = frame.map_err(|_| too_slow())? else {
            break;
        };
        let frame = frame.map_err(|error| {
            ApiError::invalid(None, format!("the body cannot be read: {error}"))
        })?;
        let Ok(data) = frame.into_data() else {
            continue; // trailers
        };
        n_read = n_read.saturating_add(data.len());
        if n_read > DRAINED {
            break;
        }
        if n_read.max(announced) <= limit {
            bytes.extend_from_slice(&data);
        }
    }
    match n_read.max(announced) > limit {
        true => Err(too_large(limit)),
        false => Ok(bytes.freeze()),
    }
}

fn too_slow() -> ApiError {
    ApiError::new(
        StatusCode::REQUEST_TIMEOUT,
        "the rest of the body does not come",
    )
    .with_code("timeout")
}

fn too_large(limit: usize) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the body has more than {limit} bytes"),
    )
    .with_code("body_too_large")
}
