package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"sallyport/internal/authz"
)

// apikey is "sallyport apikey".
func (c *cli) apikey() *cobra.Command {
	cmd := &cobra.Command{Use: "apikey", Short: "Make API keys and the hashes that tokens.yaml holds"}
	create := &cobra.Command{
		Use: "create", Short: "Make a random key and its hash", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			key, hash := authz.NewAPIKey()
			return c.emit(map[string]string{"key": key, "hash": hash}, []string{"WHAT", "TEXT", "FOR"}, [][]string{
				{"key", key, "the caller; it is not shown again"}, {"hash", hash, "hashes of this key in tokens.yaml"},
			})
		},
	}
	var random bool
	hash := &cobra.Command{
		Use: "hash", Short: "Hash a key that stands on standard input", Args: cobra.NoArgs,
		Long: "Hash a key that stands on standard input, in one line. A key that apikey create made is hashed by\nSHA-256, any other by argon2id, because a person may have chosen it.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			line, err := bufio.NewReader(io.LimitReader(cmd.InOrStdin(), 4096)).ReadString('\n')
			if err != nil && err != io.EOF {
				return fmt.Errorf("read the key: %w", err)
			}
			key := []byte(strings.TrimRight(line, "\r\n"))
			h, err := authz.HashAPIKey(key, random || authz.IsRandomAPIKey(key))
			if err != nil {
				return usage(err)
			}
			return c.emit(map[string]string{"hash": h}, []string{"HASH"}, [][]string{{h}})
		},
	}
	hash.Flags().BoolVar(&random, "random", false, "the key was made of 128 random bits or more: SHA-256 is enough")
	cmd.AddCommand(create, hash)
	return cmd
}
