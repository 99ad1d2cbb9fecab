package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"sallyport/internal/authz"
)

// shadowed is what one proxy knows of the candidate.
type shadowed struct {
	Proxy string `json:"proxy"`
	authz.CandidateReport
}

// policyShadow is "sallyport policy shadow".
func (c *cli) policyShadow() *cobra.Command {
	var proxies []string
	cmd := &cobra.Command{
		Use:   "shadow",
		Short: "Show the calls that the candidate would decide otherwise, as proxies count them",
		Long: "Show the calls that the rows in candidate/ would decide otherwise than those in\n" +
			"force. Proxies judge each call by both and answer by those in force; they are\n" +
			"asked on their admin sockets.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sockets, err := socketsOf(proxies)
			if err != nil {
				return err
			}
			var (
				told []shadowed
				errs []error
			)
			for _, s := range sockets {
				r := shadowed{Proxy: s}
				if err := askProxy(cmd.Context(), s, "candidate", &r.CandidateReport); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", s, err))
					continue
				}
				told = append(told, r)
			}
			return errors.Join(c.printShadow(told), failed(errors.Join(errs...)))
		},
	}
	proxyFlag(cmd, &proxies)
	return cmd
}

func (c *cli) printShadow(told []shadowed) error {
	if c.format == "json" {
		return c.emit(told, nil, nil)
	}
	var rows [][]string
	for _, r := range told {
		switch {
		case r.Refused != "":
			fmt.Fprintf(c.stdout, "%s: the candidate of policy revision %d is REFUSED: %s\n", r.Proxy, r.Revision, r.Refused)
		case !r.Tried:
			fmt.Fprintf(c.stdout, "%s: no candidate\n", r.Proxy)
		default:
			fmt.Fprintf(c.stdout, "%s: candidate %.12s of %s, policy revision %d, %s\n", r.Proxy, r.Hash, count(r.Rows, "row"), r.Revision, count(len(r.Differences), "difference"))
		}
		for _, d := range r.Differences {
			rows = append(rows, differenceRow(d))
		}
	}
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintln(c.stdout)
	return c.emit(nil, []string{"CALLS", "DIFFERENCE", "ROW", "FROM", "TO", "SUCH AS", "IN FORCE", "CANDIDATE", "LAST"}, rows)
}

func differenceRow(d authz.Difference) []string {
	last := age(time.Since(d.Last)) + " ago"
	if d.Rule == "" {
		return []string{strconv.FormatUint(d.Count, 10), string(d.Kind), "(all others)", "", "", "", "", "", last}
	}
	such := fmt.Sprintf("%s %s, port %d", d.Verb, d.Path, d.Port)
	return []string{strconv.FormatUint(d.Count, 10), string(d.Kind), d.Rule, d.Src, d.Dst, such, d.InForce, d.Candidate, last}
}

// proxyFlag lets a command name the admin sockets of proxies.
func proxyFlag(cmd *cobra.Command, proxies *[]string) {
	cmd.Flags().StringSliceVar(proxies, "proxy", nil, "the admin socket of a proxy, may be repeated (default: "+packagedProxies+")")
}

// socketsOf are the admin sockets to ask: those that were named, or else those
// of packaged proxies.
func socketsOf(named []string) ([]string, error) {
	if len(named) > 0 {
		return named, nil
	}
	found, _ := filepath.Glob(packagedProxies) // the pattern is a good one
	if len(found) == 0 {
		return nil, usage(fmt.Errorf("no proxy runs at %s: name its admin socket with --proxy", packagedProxies))
	}
	return found, nil
}

// errNotKnown is returned by askProxy when the proxy does not know it.
var errNotKnown = errors.New("it does not know it")

// askProxy reads a document from the admin socket of a proxy.
func askProxy(ctx context.Context, socket, path string, into any) error {
	status, b, err := askAdmin(ctx, 10*time.Second, http.MethodGet, socket, "/"+path)
	switch {
	case err != nil:
		return err
	case status == http.StatusNotFound:
		return errNotKnown
	case status != http.StatusOK:
		return fmt.Errorf("it answers %d %s", status, http.StatusText(status))
	}
	return json.Unmarshal(b, into)
}
