# Reads an object with the AWS SDK for Ruby (version 3) and its default credential chain.
require "aws-sdk-s3"

endpoint, bucket, key, times, pause = ARGV
$stdout.sync = true
client = nil
status = 1

def one_line(error)
  messages = []
  while error
    messages << error.message
    error = error.cause
  end
  messages.join(": ").split.join(" ")
end

times.to_i.times do |i|
  sleep pause.to_f if i.positive?
  begin
    client ||= Aws::S3::Client.new(endpoint: endpoint, force_path_style: true)
    puts "read #{client.get_object(bucket: bucket, key: key).body.read.chomp}"
    status = 0
  rescue StandardError => e
    puts "failed #{one_line(e)}"
    status = 1
    # A client that got no credentials when it was made never fetches any again.
    client = nil if e.is_a?(Aws::Errors::MissingCredentialsError)
  end
end
exit status
