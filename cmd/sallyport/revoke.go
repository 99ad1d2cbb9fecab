package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/control"
	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
)

// revoke is "sallyport revoke".
func (c *cli) revoke() *cobra.Command {
	cmd := &cobra.Command{
		Use: "revoke", Short: "End X.509-SVIDs before their time",
		Long: "End X.509-SVIDs before their time. Every proxy closes what is open to whoever\n" +
			"shows one, and takes no new connection. What is issued afterwards holds: to keep\n" +
			"a node out, ban it (sallyport agent ban); to take an identity away, remove its\n" +
			"entry. Both revoke what was issued before.",
	}
	var wait time.Duration
	one := func(use, short, long string, order func(arg string) (mesh.RevokeOrder, error)) {
		cmd.AddCommand(&cobra.Command{
			Use: use, Short: short, Long: long, Args: cobra.ExactArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				o, err := order(args[0])
				if err != nil {
					return usage(err)
				}
				if wait < 0 {
					return usage(fmt.Errorf("--wait %s is negative", wait))
				}
				var missing []string
				err = c.with(cmd, "sallyport entry list", func(ctx context.Context, a *control.Admin) (err error) {
					missing, err = c.revokeNow(ctx, a, o, wait)
					return err
				})
				if err == nil && len(missing) > 0 && wait > 0 {
					err = daemon.Hint(&daemon.ExitError{Code: daemon.Failed, Err: fmt.Errorf(
						"the SVIDs are revoked, but %d proxies do not say yet that they act on it: %s", len(missing), strings.Join(missing, ", "),
					)}, "sallyport status, and look at the logs of these proxies")
				}
				return err
			},
		})
	}
	one("svid SERIAL|SPIFFE-ID", "End one X.509-SVID, or all of an identity",
		"End one X.509-SVID, given its serial number in hex as openssl x509 -serial prints\n"+
			"it, or all that were issued to a SPIFFE ID until now. Its proxy gets a new one.",
		func(arg string) (o mesh.RevokeOrder, err error) {
			if strings.Contains(arg, "://") {
				o.ID, err = spiffeid.FromString(arg)
			} else {
				o.Serial, err = mesh.ParseSerial(arg)
			}
			return o, err
		})
	one("entry ENTRY", "End every X.509-SVID that was issued for an entry",
		"End every X.509-SVID that was issued for an entry until now. The entry stays, and\n"+
			"its proxies get new ones.",
		func(arg string) (mesh.RevokeOrder, error) {
			if arg == "" {
				return mesh.RevokeOrder{}, errors.New("an entry has an ID: see sallyport entry list")
			}
			return mesh.RevokeOrder{Entry: arg}, nil
		})
	cmd.PersistentFlags().DurationVar(&wait, "wait", 10*time.Second, "how long to wait until every connected proxy acts on it")
	return cmd
}

// A revoked is what the command prints as JSON.
type revoked struct {
	mesh.RevokeResult
	heeded
}

// A heeded says who acts on what an operator has told all proxies.
type heeded struct {
	Confirmed int `json:"confirmed"`
	Connected int `json:"connected"`
	// Missing are the workloads of proxies that are connected and do not say
	// yet that they act on it.
	Missing []string `json:"missing,omitempty"`
}

// revokeNow revokes and says which proxies do not act on it in time.
func (c *cli) revokeNow(ctx context.Context, a *control.Admin, o mesh.RevokeOrder, wait time.Duration) (missing []string, err error) {
	res, err := a.Revoke(ctx, o)
	if err != nil {
		return nil, err
	}
	out := revoked{RevokeResult: res}
	if err := out.await(ctx, a, wait, func(mesh.Proxy) bool { return true }, func(p mesh.Proxy) bool { return p.Revoked >= out.Revision }); err != nil {
		return nil, err
	}
	rows := make([][]string, 0, len(res.SVIDs))
	for _, r := range res.SVIDs {
		rows = append(rows, []string{r.ID.String(), r.Serial, r.Until.Add(-mesh.Grace).UTC().Format(time.RFC3339)})
	}
	if err := c.emit(out, []string{"IDENTITY", "SERIAL", "WOULD HAVE ENDED"}, rows); err != nil {
		return nil, err
	}
	fmt.Fprintf(c.stderr, "%d SVIDs revoked; %d of %d connected proxies act on it\n", len(res.SVIDs), out.Confirmed, out.Connected)
	return out.Missing, nil
}

// askEvery is how often the issuer is asked who acts on an order.
const askEvery = 50 * time.Millisecond

// await asks which proxies of those that are meant act on the order, until all do
// that are connected or the time is over.
func (h *heeded) await(ctx context.Context, a *control.Admin, wait time.Duration, meant, acts func(mesh.Proxy) bool) error {
	for end := time.Now().Add(wait); ; {
		ps, err := a.Proxies(ctx)
		if err != nil {
			return err
		}
		*h = heeded{}
		for _, p := range ps {
			switch {
			case !p.Connected || !meant(p):
				continue // it is told before anything else once it connects
			case acts(p):
				h.Confirmed++
			default:
				h.Missing = append(h.Missing, p.Workload.String())
			}
			h.Connected++
		}
		if len(h.Missing) == 0 || !time.Now().Before(end) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(askEvery):
		}
	}
}
