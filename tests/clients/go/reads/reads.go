// Package reads has the common part of all clients in Go: their arguments and their output.
package reads

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// Arguments are those that each client is started with: ENDPOINT BUCKET KEY TIMES PAUSE.
type Arguments struct {
	Endpoint, Bucket, Key string
	times                 int
	pause                 time.Duration
}

// Parse ends the program if the arguments are wrong.
func Parse() Arguments {
	if len(os.Args) != 6 {
		usage()
	}
	times, err := strconv.Atoi(os.Args[4])
	if err != nil {
		usage()
	}
	pause, err := strconv.ParseFloat(os.Args[5], 64)
	if err != nil {
		usage()
	}
	return Arguments{os.Args[1], os.Args[2], os.Args[3], times, time.Duration(pause * float64(time.Second))}
}

func usage() {
	fmt.Fprintf(os.Stderr, "usage: %s ENDPOINT BUCKET KEY TIMES PAUSE\n", os.Args[0])
	os.Exit(2)
}

// Run reads the object TIMES times, prints one line with each result, and ends the program.
func (a Arguments) Run(read func() ([]byte, error)) {
	status := 1
	for i := range a.times {
		if i > 0 {
			time.Sleep(a.pause)
		}
		content, err := read()
		if err != nil {
			status = 1
			fmt.Println("failed", strings.Join(strings.Fields(err.Error()), " "))
			continue
		}
		status = 0
		fmt.Println("read", strings.TrimSuffix(string(content), "\n"))
	}
	os.Exit(status)
}
