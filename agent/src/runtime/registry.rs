//! Speaks to registries: manifests and blobs by GET, tokens when they are asked for.
//!
//! Nothing that a registry sends is taken whole unless it is small: manifests, tokens and
//! error texts are read up to a limit and within a time, blobs are handed on as they
//! come. Credentials go to the registry and to the token server that it names, never
//! over plain HTTP unless the registry itself is one that is spoken to so. Redirects are
//! followed, but not from TLS to plain HTTP. Whether bytes are the right ones is for
//! the caller to check. Touches the network only.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, RANGE, WWW_AUTHENTICATE};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use swarm_proto::image::ImageRef;
use swarm_proto::v1::RegistryAuth;

use super::pull::chain;

/// Manifests and configurations, as containerd limits them.
pub(super) const MANIFEST_MAX: usize = 4 << 20;
/// Tokens, and what a registry says of an error.
const ANSWER_MAX: usize = 256 << 10;
const REDIRECTS_MAX: usize = 5;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Docker Hub's images are served under another name.
const HUB_HOST: &str = "registry-1.docker.io";

/// Why a registry did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegistryError {
    /// No answer, or the answer of a registry that is ill: worth another try.
    #[error("{0}")]
    Unreachable(String),
    /// It does not have it.
    #[error("not found")]
    Missing,
    /// It wants other credentials.
    #[error("access refused")]
    Denied,
    /// It answers, but not as it should.
    #[error("{0}")]
    Unusable(String),
}

/// The ways to all registries. Cheap to clone; connections are shared.
#[derive(Clone, Debug)]
pub(super) struct Registries {
    http: Client,
    insecure: Arc<[String]>,
    /// For a whole small answer, and for the first byte of a large one.
    patience: Duration,
}

/// One image at its registry, with the credentials of one pull.
#[derive(Debug)]
pub(super) struct Repository<'a> {
    registries: Registries,
    image: &'a ImageRef,
    auth: Option<&'a RegistryAuth>,
    /// What the registry wanted to see last time: never shared with another pull.
    authorization: Mutex<Option<HeaderValue>>,
}

/// A blob as it comes.
#[derive(Debug)]
pub(super) struct Blob {
    /// Read it with `chunk`.
    pub response: Response,
    /// Whether it begins at the offset that was asked for.
    pub resumed: bool,
}

impl Registries {
    /// `insecure`: "host:port" of those that are spoken to without TLS.
    pub fn new(insecure: Vec<String>, patience: Duration) -> Result<Self, RegistryError> {
        let follow = redirect::Policy::custom(|attempt| {
            let downgrade = attempt
                .previous()
                .last()
                .is_some_and(|from| from.scheme() == "https" && attempt.url().scheme() != "https");
            if downgrade {
                return attempt.error("the registry redirects from TLS to plain HTTP");
            }
            match attempt.previous().len() > REDIRECTS_MAX {
                true => attempt.error("too many redirects"),
                false => attempt.follow(),
            }
        });
        let http = Client::builder()
            .user_agent(concat!("swarm/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(follow)
            .build()
            .map_err(|err| RegistryError::Unusable(chain(&err)))?;
        Ok(Self {
            http,
            insecure: insecure.into(),
            patience,
        })
    }

    pub fn repository<'a>(
        &self,
        image: &'a ImageRef,
        auth: Option<&'a RegistryAuth>,
    ) -> Repository<'a> {
        Repository {
            registries: self.clone(),
            image,
            auth,
            authorization: Mutex::default(),
        }
    }
}

/// Where something of an image is.
pub(super) fn url(
    image: &ImageRef,
    insecure: &[String],
    what: &str,
    which: &str,
) -> Result<Url, RegistryError> {
    let registry = image.registry();
    let scheme = match insecure.iter().any(|known| known == registry) {
        true => "http",
        false => "https",
    };
    let host = match registry {
        "docker.io" => HUB_HOST,
        other => other,
    };
    let text = format!("{scheme}://{host}/v2/{}/{what}/{which}", image.repository());
    text.parse()
        .map_err(|err| RegistryError::Unusable(format!("{text:?} is no address: {err}")))
}

impl Repository<'_> {
    /// A manifest or an index, by tag or digest.
    pub async fn manifest(&self, which: &str) -> Result<Vec<u8>, RegistryError> {
        self.small("manifests", which).await
    }

    /// A blob that must be small.
    pub async fn small_blob(&self, digest: &str) -> Result<Vec<u8>, RegistryError> {
        self.small("blobs", digest).await
    }

    async fn small(&self, what: &str, which: &str) -> Result<Vec<u8>, RegistryError> {
        let url = url(self.image, &self.registries.insecure, what, which)?;
        within(self.registries.patience, async {
            read(self.get(url, 0).await?, MANIFEST_MAX).await
        })
        .await
    }

    /// A blob from `offset` on, or from its beginning if the registry knows no ranges.
    pub async fn blob(&self, digest: &str, offset: u64) -> Result<Blob, RegistryError> {
        let url = url(self.image, &self.registries.insecure, "blobs", digest)?;
        let response = within(self.registries.patience, self.get(url, offset)).await?;
        let resumed = offset == 0 || response.status() == StatusCode::PARTIAL_CONTENT;
        Ok(Blob { response, resumed })
    }

    async fn get(&self, url: Url, offset: u64) -> Result<Response, RegistryError> {
        let mut response = self.send(&url, offset).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            let wanted = self.authorize(&url, &response).await?;
            if *self.authorization.lock() == Some(wanted.clone()) {
                // It has seen just that already.
                return Err(RegistryError::Denied);
            }
            *self.authorization.lock() = Some(wanted);
            response = self.send(&url, offset).await?;
        }
        match response.status() {
            status if status.is_success() => Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Err(RegistryError::Denied),
            _ => Err(failure(response).await),
        }
    }

    async fn send(&self, url: &Url, offset: u64) -> Result<Response, RegistryError> {
        let mut request = self.registries.http.get(url.clone());
        request = request.header(ACCEPT, MANIFEST_TYPES);
        if offset > 0 {
            request = request.header(RANGE, format!("bytes={offset}-"));
        }
        if let Some(authorization) = self.authorization.lock().clone() {
            request = request.header(AUTHORIZATION, authorization);
        }
        let sent = request.send().await;
        sent.map_err(|err| RegistryError::Unreachable(chain(&err)))
    }

    /// What to show a registry that has asked who we are.
    async fn authorize(&self, from: &Url, asked: &Response) -> Result<HeaderValue, RegistryError> {
        if let Some(auth) = self.auth.filter(|auth| !auth.identity_token.is_empty()) {
            return secret("Bearer", &auth.identity_token);
        }
        let challenges: Vec<Challenge> = asked
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .filter_map(parse_challenges)
            .flatten()
            .collect();
        for challenge in challenges {
            match challenge {
                Challenge::Bearer { realm, service } => {
                    return self.token(from, &realm, service.as_deref()).await;
                }
                Challenge::Basic => {
                    if let Some(basic) = self.basic()? {
                        return Ok(basic);
                    }
                }
            }
        }
        Err(RegistryError::Denied)
    }

    fn basic(&self) -> Result<Option<HeaderValue>, RegistryError> {
        use base64::Engine as _;
        let Some(auth) = self.auth.filter(|auth| !auth.username.is_empty()) else {
            return Ok(None);
        };
        let pair = format!("{}:{}", auth.username, auth.password);
        let pair = base64::engine::general_purpose::STANDARD.encode(pair);
        secret("Basic", &pair).map(Some)
    }

    /// Asks the server that the registry names for a token.
    async fn token(
        &self,
        from: &Url,
        realm: &str,
        service: Option<&str>,
    ) -> Result<HeaderValue, RegistryError> {
        let unusable = |why: String| RegistryError::Unusable(why);
        let mut url: Url = realm
            .parse()
            .map_err(|err| unusable(format!("token server {realm:?} is no address: {err}")))?;
        if !(url.scheme() == "https" || url.scheme() == from.scheme()) {
            return Err(unusable(format!(
                "its token server {realm:?} is not spoken to without TLS"
            )));
        }
        {
            let mut query = url.query_pairs_mut();
            query.append_pair(
                "scope",
                &format!("repository:{}:pull", self.image.repository()),
            );
            if let Some(service) = service {
                query.append_pair("service", service);
            }
        }
        let mut request = self.registries.http.get(url);
        if let Some(basic) = self.basic()? {
            request = request.header(AUTHORIZATION, basic);
        }
        let response = request.send().await;
        let response = response.map_err(|err| RegistryError::Unreachable(chain(&err)))?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(RegistryError::Denied),
            _ => return Err(failure(response).await),
        }
        let body = read(response, ANSWER_MAX).await?;
        secret("Bearer", &parse_token(&body).map_err(unusable)?)
    }
}

fn secret(kind: &str, text: &str) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::from_str(&format!("{kind} {text}"))
        .map_err(|_| RegistryError::Unusable("credentials that no header can hold".into()))?;
    value.set_sensitive(true);
    Ok(value)
}

/// A way in that a registry offers.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    Bearer {
        realm: String,
        service: Option<String>,
    },
    Basic,
}

/// Reads a `WWW-Authenticate`; `None` if it is none.
pub(super) fn parse_challenges(header: &str) -> Option<Vec<Challenge>> {
    let parsed = http_auth::parse_challenges(header).ok()?;
    let known = parsed.into_iter().filter_map(|challenge| {
        let param = |name: &str| {
            let found = challenge
                .params
                .iter()
                .find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        if challenge.scheme.eq_ignore_ascii_case("bearer") {
            return Some(Challenge::Bearer {
                realm: param("realm")?,
                service: param("service"),
            });
        }
        let basic = challenge.scheme.eq_ignore_ascii_case("basic");
        basic.then_some(Challenge::Basic)
    });
    Some(known.collect())
}

/// The token in a token server's answer.
pub(super) fn parse_token(body: &[u8]) -> Result<String, String> {
    #[derive(Deserialize)]
    struct Answer {
        #[serde(default)]
        token: String,
        #[serde(default)]
        access_token: String,
    }
    let answer: Answer =
        serde_json::from_slice(body).map_err(|err| format!("damaged token: {err}"))?;
    match (answer.token, answer.access_token) {
        (token, other) if token.is_empty() && other.is_empty() => {
            Err("the token server sent no token".into())
        }
        (token, other) if token.is_empty() => Ok(other),
        (token, _) => Ok(token),
    }
}

/// What a registry says of an error: whether it means "no such thing", and its words.
pub(super) fn parse_errors(body: &[u8]) -> (bool, String) {
    #[derive(Deserialize)]
    struct Answer {
        errors: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(answer) = serde_json::from_slice::<Answer>(body) else {
        return (false, String::new());
    };
    let missing = [
        "MANIFEST_UNKNOWN",
        "NAME_UNKNOWN",
        "NAME_INVALID",
        "NOT_FOUND",
    ];
    let is_missing = |entry: &Entry| missing.contains(&entry.code.as_str());
    let words: Vec<String> = answer
        .errors
        .iter()
        .map(|entry| format!("{}: {}", entry.code, entry.message))
        .collect();
    (answer.errors.iter().any(is_missing), words.join("; "))
}

async fn failure(response: Response) -> RegistryError {
    let status = response.status();
    let body = read(response, ANSWER_MAX).await.unwrap_or_default();
    let (missing, words) = parse_errors(&body);
    if missing || status == StatusCode::NOT_FOUND {
        return RegistryError::Missing;
    }
    let text = match words.is_empty() {
        true => format!("the registry answers {status}"),
        false => format!("the registry answers {status}: {words}"),
    };
    match status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
        true => RegistryError::Unreachable(text),
        false => RegistryError::Unusable(text),
    }
}

/// The whole body, if it has at most `limit` bytes.
async fn read(mut response: Response, limit: usize) -> Result<Vec<u8>, RegistryError> {
    let mut body = Vec::new();
    loop {
        let chunk: Option<Bytes> = response
            .chunk()
            .await
            .map_err(|err| RegistryError::Unreachable(chain(&err)))?;
        let Some(chunk) = chunk else { return Ok(body) };
        if body.len() + chunk.len() > limit {
            return Err(RegistryError::Unusable(format!(
                "the registry sent more than {limit} bytes where little is expected"
            )));
        }
        body.extend_from_slice(&chunk);
    }
}

async fn within<T>(
    patience: Duration,
    work: impl Future<Output = Result<T, RegistryError>>,
) -> Result<T, RegistryError> {
    tokio::time::timeout(patience, work)
        .await
        .unwrap_or_else(|_| {
            Err(RegistryError::Unreachable(format!(
                "the registry did not answer within {patience:?}"
            )))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_follow_the_reference_and_the_configuration() {
        let at = |image: &str| {
            let image = ImageRef::parse(image).unwrap();
            url(&image, &["h:5000".to_owned()], "manifests", "1").unwrap()
        };
        assert_eq!(
            at("nginx").as_str(),
            "https://registry-1.docker.io/v2/library/nginx/manifests/1"
        );
        assert_eq!(
            at("h:5000/a/b").as_str(),
            "http://h:5000/v2/a/b/manifests/1"
        );
        assert_eq!(at("h:5001/a").as_str(), "https://h:5001/v2/a/manifests/1");
        assert_eq!(
            at("[fd00::1]:5000/a").as_str(),
            "https://[fd00::1]:5000/v2/a/manifests/1"
        );
    }

    #[test]
    fn challenges_tokens_and_errors_are_read() {
        let header = r#"Bearer realm="https://a.example/token",service="a",Basic realm="x""#;
        let bearer = Challenge::Bearer {
            realm: "https://a.example/token".into(),
            service: Some("a".into()),
        };
        assert_eq!(
            parse_challenges(header),
            Some(vec![bearer, Challenge::Basic])
        );
        assert_eq!(parse_challenges("\u{1}"), None);
        assert_eq!(parse_token(br#"{"token":"t"}"#).unwrap(), "t");
        assert_eq!(parse_token(br#"{"access_token":"u"}"#).unwrap(), "u");
        assert!(parse_token(b"{}").is_err());
        let body = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no","detail":{}}]}"#;
        assert_eq!(parse_errors(body), (true, "MANIFEST_UNKNOWN: no".into()));
        assert_eq!(parse_errors(b"<html>"), (false, String::new()));
    }
}
