// rclone as it is, with only the storage and the command that the tests use: with all of them it builds for minutes.
package main

import (
	_ "github.com/rclone/rclone/backend/s3"
	"github.com/rclone/rclone/cmd"
	_ "github.com/rclone/rclone/cmd/cat"
	_ "github.com/rclone/rclone/cmd/version"
)

func main() {
	cmd.Main()
}
