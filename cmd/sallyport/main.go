// Command sallyport is the operator's hand: it asks the issuer how things are,
// checks policy files and audit logs, and runs the demo. It changes no live
// state that a reviewed file should change.
package main

import (
	"context"
	"fmt"
	"os"

	"sallyport/internal/daemon"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "sallyport: %v\n", err)
		os.Exit(daemon.Code(err))
	}
}
