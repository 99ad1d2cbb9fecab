// Command injector puts a sidecar into pods: it is asked by Kubernetes for each
// pod that is made, and answers with what to add. It holds no identity, speaks
// to nobody and knows no cluster.
package main

import (
	"context"
	"fmt"
	"os"

	"sallyport/internal/daemon"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "injector: %v\n", err)
		os.Exit(daemon.Code(err))
	}
}
