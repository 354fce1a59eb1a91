// Reads an object with the AWS SDK for Go v1 and its default credential chain.
package main

import (
	"fmt"
	"io"
	"os"

	"clients/go/reads"

	"github.com/aws/aws-sdk-go/aws"
	"github.com/aws/aws-sdk-go/aws/session"
	"github.com/aws/aws-sdk-go/service/s3"
)

func main() {
	arguments := reads.Parse()
	session, err := session.NewSession(&aws.Config{
		// Without it an error of the container endpoint is only "no valid providers in chain".
		CredentialsChainVerboseErrors: aws.Bool(true),
		Endpoint:                      aws.String(arguments.Endpoint),
		S3ForcePathStyle:              aws.Bool(true),
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	client := s3.New(session)
	arguments.Run(func() ([]byte, error) {
		object, err := client.GetObject(&s3.GetObjectInput{
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
