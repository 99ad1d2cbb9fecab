package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"sallyport/internal/shadow"
)

// shadow is "sallyport shadow".
func (c *cli) shadow() *cobra.Command {
	cmd := &cobra.Command{Use: "shadow", Short: "See what backends would answer that get copies of calls"}
	cmd.AddCommand(c.shadowReport())
	return cmd
}

// compared is what one proxy has compared.
type compared struct {
	Proxy string `json:"proxy"`
	shadow.Report
}

func (c *cli) shadowReport() *cobra.Command {
	var proxies []string
	cmd := &cobra.Command{
		Use:   "report",
		Short: "Show in what shadows answer otherwise than primaries, as proxies have compared them",
		Long: `Show in what shadows answer otherwise than primaries, as proxies have compared
them since they started. A field in which two primaries differ as well is noise.
Proxies are asked on their admin sockets.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			sockets, err := socketsOf(proxies)
			if err != nil {
				return err
			}
			told := []compared{}
			var all []shadow.Endpoint
			var errs []error
			for _, s := range sockets {
				r := compared{Proxy: s}
				if err := askProxy(cmd.Context(), s, "shadow", &r.Report); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", s, err))
					continue
				}
				told = append(told, r)
				all = append(all, r.Endpoints...)
			}
			return errors.Join(c.emitReport(told, all), failed(errors.Join(errs...)))
		},
	}
	proxyFlag(cmd, &proxies)
	return cmd
}
