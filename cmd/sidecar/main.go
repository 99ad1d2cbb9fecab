// Command sidecar stands beside one workload: it holds the workload's identity,
// serves the SPIFFE Workload API, and carries its calls over mutual TLS.
package main

import (
	"context"
	"fmt"
	"os"

	"sallyport/internal/daemon"
	"sallyport/internal/isolate"
)

func main() {
	if isolate.Entering() {
		os.Exit(isolate.Enter())
	}
	if err := run(context.Background(), os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "sidecar: %v\n", err)
		os.Exit(daemon.Code(err))
	}
}
