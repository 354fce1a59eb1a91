//! Reads an object with the AWS SDK for Rust and its default credential chain.

use std::process::ExitCode;

use aws_config::BehaviorVersion;
use clients_rust::Arguments;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse()?;
    let shared = aws_config::defaults(BehaviorVersion::latest()).endpoint_url(&arguments.endpoint).load().await;
    let configuration = aws_sdk_s3::config::Builder::from(&shared).force_path_style(true).build();
    let client = aws_sdk_s3::Client::from_conf(configuration);
    let read = async || {
        let object = client.get_object().bucket(&arguments.bucket).key(&arguments.key).send().await?;
        Ok(String::from_utf8(object.body.collect().await?.to_vec())?)
    };
    Ok(arguments.run(read).await)
}
