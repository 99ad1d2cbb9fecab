package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/authz"
	"sallyport/internal/daemon"
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
			if len(proxies) == 0 {
				proxies, _ = filepath.Glob(packagedProxies) // the pattern is a good one
			}
			if len(proxies) == 0 {
				return usage(fmt.Errorf("no proxy runs at %s: name its admin socket with --proxy", packagedProxies))
			}
			var errs []error
			for _, socket := range proxies {
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
	cmd.Flags().StringSliceVar(&proxies, "proxy", nil, "the admin socket of a proxy, may be repeated (default: "+packagedProxies+")")
	return cmd
}

// askWhy asks one proxy.
func askWhy(ctx context.Context, socket, id string) (w authz.Why, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin/why/"+url.PathEscape(id), nil)
	if err != nil {
		return w, err
	}
	resp, err := daemon.AdminClient(socket).Do(req)
	if err != nil {
		return w, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
	switch {
	case err != nil:
		return w, err
	case resp.StatusCode == http.StatusNotFound:
		return w, errors.New("it knows no such denial; look for the id in its audit log")
	case resp.StatusCode != http.StatusOK:
		return w, fmt.Errorf("it answers %s", resp.Status)
	}
	return w, json.Unmarshal(b, &w)
}
