package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"sallyport/internal/daemon"
	"sallyport/internal/mesh"
	"sallyport/internal/review"
)

// policy is "sallyport policy".
func (c *cli) policy() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Check the reviewed policy files"}
	var td string
	cmd.PersistentFlags().StringVar(&td, "trust-domain", "", "the trust domain (default: that of the first service)")
	cmd.AddCommand(&cobra.Command{
		Use: "lint DIR", Short: "Find mistakes and rows that do not do what they seem to", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return c.lint(args[0], td) },
	}, &cobra.Command{
		Use: "test DIR", Short: "Decide the cases in DIR/tests and show which rows they cover", Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return c.policyTest(args[0], td) },
	}, c.policyDiff(&td))
	return cmd
}

// parsePolicies reads a folder. Mistakes in it are a failed check, a folder
// that is not there is a mistake on the command line.
func parsePolicies(dir, td string) (*mesh.Policies, error) {
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		return nil, usage(fmt.Errorf("%s is not a folder of policy files", dir))
	}
	var domain spiffeid.TrustDomain
	var err error
	if td != "" {
		if domain, err = spiffeid.TrustDomainFromString(td); err != nil {
			return nil, usage(fmt.Errorf("--trust-domain: %w", err))
		}
	} else if domain, err = guessTrustDomain(dir); err != nil {
		return nil, usage(fmt.Errorf("%w; name it with --trust-domain", err))
	}
	p, err := mesh.ParseDir(dir, domain)
	if err == nil {
		err = p.Validate()
	}
	if err != nil {
		return nil, &daemon.ExitError{Code: daemon.Failed, Err: err}
	}
	return p, nil
}

func (c *cli) lint(dir, td string) error {
	p, err := parsePolicies(dir, td)
	if err != nil {
		return err
	}
	findings := review.Lint(p, time.Now())
	for _, f := range findings {
		fmt.Fprintln(c.stdout, f)
	}
	fmt.Fprintf(c.stdout, "%d rules, %d services, %d entries, %d findings\n", len(p.Rules), len(p.Services), len(p.Entries), len(findings))
	if len(findings) > 0 {
		return &daemon.ExitError{Code: daemon.Failed, Err: errors.New("findings to look at")}
	}
	return nil
}

func (c *cli) policyTest(dir, td string) error {
	p, err := parsePolicies(dir, td)
	if err != nil {
		return err
	}
	rep := review.Test(p)
	if c.format == "json" {
		if err := c.emit(rep, nil, nil); err != nil {
			return err
		}
		return failed(rep.Err())
	}
	for _, r := range rep.Results {
		if r.OK {
			fmt.Fprintf(c.stdout, "ok    %s\n", r.Case.Name)
		}
	}
	for _, r := range rep.Failed() {
		fmt.Fprintf(c.stdout, "FAIL  %s\n", r.Error())
	}
	for _, row := range rep.Rows {
		if row.Cases == 0 {
			fmt.Fprintf(c.stdout, "row   %s: %s is decided by no case\n", row.Origin, row.ID)
		}
	}
	fmt.Fprintf(c.stdout, "%d cases, %d failed, %d of %d rows covered\n", len(rep.Results), len(rep.Failed()), rep.Covered(), len(rep.Rows))
	return failed(rep.Err())
}

// anyID finds a SPIFFE ID in any of the files.
var anyID = regexp.MustCompile(`spiffe://([a-z0-9._-]+)/`)

// guessTrustDomain takes the trust domain that the services are written with.
func guessTrustDomain(dir string) (spiffeid.TrustDomain, error) {
	for _, name := range []string{"services.yaml", "entries.yaml", "access.csv"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			continue // the parser says what is wrong with it
		}
		if m := anyID.FindSubmatch(b); m != nil {
			return spiffeid.TrustDomainFromString(string(m[1]))
		}
	}
	return spiffeid.TrustDomain{}, fmt.Errorf("no file in %s names a trust domain", dir)
}
