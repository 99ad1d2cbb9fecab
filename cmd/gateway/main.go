// Command gateway is the only way out: it knows its callers by their SVIDs and
// opens tunnels to the external hosts that policy allows each of them.
package main

import (
	"context"
	"fmt"
	"os"

	"sallyport/internal/daemon"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "gateway: %v\n", err)
		os.Exit(daemon.Code(err))
	}
}
