package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/authz"
	"sallyport/internal/control"
)

// packagedProxies is where packaged proxies have their admin sockets.
const packagedProxies = "/run/sallyport/*/admin.sock"

// why is "sallyport why".
func (c *cli) why() *cobra.Command {
	var proxies []string
	cmd := &cobra.Command{
		Use:   "why ID",
		Short: "Say why a call was allowed or denied, by the decision id that its caller was told",
		Long: "Say why a call was allowed or denied, by the decision id that its caller was told.\n" +
			"Proxies on this node are asked first: each knows its last 512 denials, and the\n" +
			"policy that made them. Then the issuer is asked, which has the audit logs of all\n" +
			"proxies: it knows allowed calls, too, and explains by the policy in force now.\n" +
			"With --proxy only those proxies are asked.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			sockets := proxies
			if len(sockets) == 0 && !cmd.Flags().Changed("socket") {
				sockets, _ = filepath.Glob(packagedProxies) // the pattern is a good one
			}
			var errs []error
			for _, socket := range sockets {
				w, err := askWhy(cmd.Context(), socket, args[0])
				if err == nil {
					return c.printWhy(w, &authz.Recorded{Why: w})
				}
				errs = append(errs, fmt.Errorf("%s: %w", socket, err))
			}
			if len(proxies) > 0 {
				return failed(errors.Join(errs...))
			}
			r, err := c.askIssuer(cmd.Context(), args[0])
			if err != nil {
				return failed(errors.Join(append(errs, err)...))
			}
			return c.printWhy(r, &r)
		},
	}
	proxyFlag(cmd, &proxies)
	return cmd
}

// printWhy prints an account; v is its JSON form.
func (c *cli) printWhy(v any, r *authz.Recorded) error {
	if c.format == "json" {
		return c.emit(v, nil, nil)
	}
	fmt.Fprintf(c.stdout, "decision %s, %s, policy revision %d\n", r.ID, r.Time.UTC().Format(time.RFC3339), r.Revision)
	if r.Log != "" {
		fmt.Fprintf(c.stdout, "log      %s\n", r.Log)
	}
	if r.DecidedBy != 0 && r.DecidedBy != r.Revision {
		fmt.Fprintf(c.stdout, "NOTE     revision %d decided; the rows below are those in force now, revision %d\n", r.DecidedBy, r.Revision)
	}
	writeAccount(c.stdout, &r.Account)
	if r.Conds != "" {
		fmt.Fprintf(c.stdout, "held     %s\n", condsText(r.Conds))
	}
	if r.Counted > 0 {
		fmt.Fprintf(c.stdout, "counted  %s of this kind together\n", count(int(r.Counted), "call")) //nolint:gosec // for people
	}
	if r.Detail != "" {
		fmt.Fprintf(c.stdout, "record   %s\n", r.Detail)
	}
	return nil
}

// condsText says what a row asks beside its columns.
func condsText(conds string) string {
	if conds == "-" {
		return "the row has no conditions"
	}
	return conds
}

// askIssuer asks the issuer.
func (c *cli) askIssuer(ctx context.Context, id string) (r authz.Recorded, err error) {
	a, err := c.admin()
	if err != nil {
		return r, err
	}
	defer a.Close()
	b, err := a.Why(ctx, id)
	if errors.Is(err, control.ErrUnreachable) {
		return r, c.unreachable(err)
	}
	if err != nil {
		return r, err // it says where else to look
	}
	return r, json.Unmarshal(b, &r)
}

// askWhy asks one proxy.
func askWhy(ctx context.Context, socket, id string) (w authz.Why, err error) {
	err = askProxy(ctx, socket, "why/"+url.PathEscape(id), &w)
	if errors.Is(err, errNotKnown) {
		err = errors.New("it knows no such denial; look for the id in its audit log")
	}
	return w, err
}
