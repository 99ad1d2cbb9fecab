package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/authz"
)

// packagedProxies is where packaged proxies have their admin sockets.
const packagedProxies = "/run/sallyport/*/admin.sock"

// why is "sallyport why".
func (c *cli) why() *cobra.Command {
	var proxies []string
	cmd := &cobra.Command{
		Use:   "why ID",
		Short: "Say why a call was denied, by the decision id that its caller was told",
		Long: "Say why a call was denied, by the decision id that its caller was told. The proxy\n" +
			"that denied it is asked on its admin socket; it knows its last 512 denials.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sockets, err := socketsOf(proxies)
			if err != nil {
				return err
			}
			var errs []error
			for _, socket := range sockets {
				w, err := askWhy(cmd.Context(), socket, args[0])
				if err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", socket, err))
					continue
				}
				if c.format == "json" {
					return c.emit(w, nil, nil)
				}
				fmt.Fprintf(c.stdout, "decision %s, %s, policy revision %d\n", w.ID, w.Time.UTC().Format(time.RFC3339), w.Revision)
				writeAccount(c.stdout, &w.Account)
				return nil
			}
			return failed(errors.Join(errs...))
		},
	}
	proxyFlag(cmd, &proxies)
	return cmd
}

// askWhy asks one proxy.
func askWhy(ctx context.Context, socket, id string) (w authz.Why, err error) {
	err = askProxy(ctx, socket, "why/"+url.PathEscape(id), &w)
	if errors.Is(err, errNotKnown) {
		err = errors.New("it knows no such denial; look for the id in its audit log")
	}
	return w, err
}
