import com.amazonaws.client.builder.AwsClientBuilder.EndpointConfiguration;
import com.amazonaws.regions.DefaultAwsRegionProviderChain;
import com.amazonaws.services.s3.AmazonS3;
import com.amazonaws.services.s3.AmazonS3ClientBuilder;

/** Reads an object with the AWS SDK for Java v1 and its default credential chain. */
class SdkV1 {
    public static void main(String[] arguments) throws InterruptedException {
        Reads reads = Reads.of(arguments);
        String region = new DefaultAwsRegionProviderChain().getRegion();
        AmazonS3 client = AmazonS3ClientBuilder.standard()
                .withEndpointConfiguration(new EndpointConfiguration(reads.endpoint(), region))
                .withPathStyleAccessEnabled(true)
                .build();
        reads.run(() -> client.getObjectAsString(reads.bucket(), reads.key()));
    }
}
