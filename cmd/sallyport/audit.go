package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

// audit is "sallyport audit".
func (c *cli) audit() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Check and read audit logs"}
	cmd.AddCommand(&cobra.Command{
		Use:   "verify FILE",
		Short: "Check the chain of an audit log: nothing changed, nothing missing, times in order",
		Args:  cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			rep, err := audit.VerifyFile(args[0])
			if err != nil && !errors.Is(err, audit.ErrBroken) {
				return usage(err)
			}
			verdict := func(v audit.Verdict) string {
				if v.OK {
					return "pass"
				}
				return fmt.Sprintf("FAIL  line %d: %s", v.Line, v.Detail)
			}
			rows := [][]string{
				{"integrity", verdict(rep.Integrity)},
				{"completeness", verdict(rep.Completeness)},
				{"time", verdict(rep.Time)},
			}
			if err := c.emit(rep, []string{"CHECK", "VERDICT"}, rows); err != nil {
				return err
			}
			if c.format == "table" {
				fmt.Fprintf(c.stdout, "%d records\n", rep.Records)
			}
			if err := rep.Err(); err != nil {
				return &daemon.ExitError{Code: daemon.Failed, Err: err}
			}
			return nil
		},
	})
	return cmd
}
