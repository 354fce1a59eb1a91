//! Reads an object with object_store, which Arrow, DataFusion and Polars use, and its builder's
//! settings from the environment.

use std::process::ExitCode;

use clients_rust::Arguments;
use object_store::ObjectStoreExt;
use object_store::aws::AmazonS3Builder;
use object_store::path::Path;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse()?;
    let store = AmazonS3Builder::from_env()
        .with_endpoint(&arguments.endpoint)
        .with_bucket_name(&arguments.bucket)
        .with_allow_http(true)
        .build()?;
    let path = Path::from(arguments.key.as_str());
    let read = async || Ok(String::from_utf8(store.get(&path).await?.bytes().await?.to_vec())?);
    Ok(arguments.run(read).await)
}
