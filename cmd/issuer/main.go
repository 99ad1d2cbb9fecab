// Command issuer is the control plane of a trust domain and its only signer:
// it attests proxies, issues their SVIDs, and distributes the reviewed policy.
// It is never on the path of a request.
package main

import (
	"context"
	"fmt"
	"os"

	"sallyport/internal/daemon"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "issuer: %v\n", err)
		os.Exit(daemon.Code(err))
	}
}
