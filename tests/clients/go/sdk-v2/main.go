// Reads an object with the AWS SDK for Go v2 and its default credential chain.
package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"clients/go/reads"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

func main() {
	arguments := reads.Parse()
	ctx := context.Background()
	configuration, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	client := s3.NewFromConfig(configuration, func(options *s3.Options) {
		options.BaseEndpoint = &arguments.Endpoint
		options.UsePathStyle = true
	})
	arguments.Run(func() ([]byte, error) {
		object, err := client.GetObject(ctx, &s3.GetObjectInput{
			Bucket: aws.String(arguments.Bucket),
			Key:    aws.String(arguments.Key),
		})
		if err != nil {
			return nil, err
		}
		defer object.Body.Close()
		return io.ReadAll(object.Body)
	})
}
