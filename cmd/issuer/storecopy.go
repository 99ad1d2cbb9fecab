package main

import (
	"errors"
	"path/filepath"

	"github.com/spf13/cobra"

	"sallyport/internal/daemon"
	"sallyport/internal/store"
)

// storeCommand is "issuer store".
func storeCommand(load func() (*Config, error)) *cobra.Command {
	cmd := &cobra.Command{Use: "store", Short: "About the database of an issuer", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(&cobra.Command{
		Use: "copy FILE", Short: "Copy the database into a new file, also while the issuer runs", Args: cobra.ExactArgs(1),
		Long: "Copy the SQLite database, as it is at one moment, into a new file. With the CA\n" +
			"keys and the configuration it is a backup: sallyport backup makes one.",
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := load()
			if err != nil {
				return err
			}
			if cfg.Database.URL != "" {
				return daemon.Hint(daemon.Exit(daemon.Failed, errors.New("the database is PostgreSQL, which has its own backups")), "pg_dump --format=custom --file FILE, with the URL of database.url")
			}
			return daemon.Exit(daemon.Failed, store.CopySQLite(cmd.Context(), filepath.Join(cfg.DataDir, "issuer.db"), args[0]))
		},
	})
	return cmd
}
