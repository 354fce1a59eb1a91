// rclone unchanged, with only the storage and the command that the tests use: with all of them a
// build takes minutes.
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
