// Reads an object with MinIO's client library for Go and its credentials "from IAM", which mean the
// container endpoint where its variables are set.
package main

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"os"

	"clients/go/reads"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

func main() {
	arguments := reads.Parse()
	client, err := newClient(arguments.Endpoint)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	arguments.Run(func() ([]byte, error) {
		object, err := client.GetObject(context.Background(), arguments.Bucket, arguments.Key, minio.GetObjectOptions{})
		if err != nil {
			return nil, err
		}
		defer object.Close()
		return io.ReadAll(object)
	})
}

func newClient(endpoint string) (*minio.Client, error) {
	address, err := url.Parse(endpoint)
	if err != nil {
		return nil, err
	}
	return minio.New(address.Host, &minio.Options{
		Creds:        credentials.NewIAM(""),
		Region:       os.Getenv("AWS_REGION"),
		Secure:       address.Scheme == "https",
		BucketLookup: minio.BucketLookupPath,
	})
}
